"""Laws of the label masks of conversations: what of the text that a chat template writes is learned."""

from __future__ import annotations

import functools
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from typing import NamedTuple

import numpy as np

from minilora.testing.compare import Array
from minilora.testing.laws import Claim, Law


@dataclass(frozen=True)
class Chat:
    """A conversation: pairs of role and content."""

    turns: tuple[tuple[str, str], ...] = (("user", "Hi."), ("assistant", "Yes."))

    def __str__(self) -> str:
        return ", ".join(f"{role} {content!r}" for role, content in self.turns)

    @property
    def messages(self) -> list[dict[str, str]]:
        return [{"role": role, "content": content} for role, content in self.turns]


Render = Callable[[list[dict[str, str]]], tuple[Sequence[str], Sequence[bool]]]


def chat_mask(render: Render, case: Chat) -> Iterator[Claim]:
    messages = case.messages
    tokens, flags = render(messages)
    changed = f"found {messages} after the call; accepted is what was given" if messages != case.messages else ""
    yield Claim("messages, which are only read,", changed)
    counts = f"found {len(flags)} labels for {len(tokens)} tokens; accepted is one for each"
    yield Claim("the number of labels", "" if len(flags) == len(tokens) else counts)
    spans = find_messages(render, case, "".join(tokens))
    lost = f"found {''.join(tokens)!r}; accepted is every message's text, whole or without white space around, in order"
    yield Claim("the text", "" if spans else lost)
    if spans and len(flags) == len(tokens):
        yield mask_claim(tokens, np.array([bool(flag) for flag in flags]), spans, case)


def find_messages(render: Render, case: Chat, text: str) -> list[tuple[int, int]]:
    """Return where each message's content is in the text; [] if they are not found one after the other.

    What stands between them is known from the same conversation with other words.
    """
    names = [f"Qz{i}zQ" for i in range(len(case.turns))]
    pieces, rest = (
        [],
        "".join(render([{**m, "content": name} for m, name in zip(case.messages, names, strict=True)])[0]),
    )
    for name in names:
        piece, _, rest = rest.partition(name)
        pieces.append(piece)
    pieces, end = [*pieces[1:], rest], len(pieces[0])
    spans = []
    for (_, content), after in zip(case.turns, pieces, strict=True):
        ways = (content, content.strip(), content.lstrip(), content.rstrip())
        kept = next((way for way in ways if text.startswith(way + after, end)), None)
        if kept is None:
            return []
        spans.append((end, end + len(kept)))
        end += len(kept) + len(after)
    return spans if end == len(text) else []


class Expected(NamedTuple):
    """What each token of a rendered conversation is, (tokens) of booleans; a token may be several."""

    reply: Array
    closing: Array  # the end token after a reply: that of the first character that is not white space
    header: Array  # between a reply and the end token of the message before it
    others: Array  # of what the user or the system says, and the end tokens after it
    either: Array  # may be learned or not: white space beside an end token, the end of a header and a reply in one


def expect(tokens: Sequence[str], spans: Sequence[tuple[int, int]], roles: Sequence[str]) -> Expected:
    """Return what the tokens are, given where the contents of the messages are in the text."""
    text, ends = "".join(tokens), np.cumsum([len(token) for token in tokens])
    begins = ends - [len(token) for token in tokens]
    is_blank = np.array([not token.strip() for token in tokens])
    found = Expected(*(np.zeros(len(tokens), dtype=bool) for _ in Expected._fields))
    is_reply = [role == "assistant" for role in roles]
    for i, (begin, end) in enumerate(spans):
        until = spans[i + 1][0] if i + 1 < len(spans) else len(text)
        mark = end + len(text[end:until]) - len(text[end:until].lstrip())
        closing = (begins <= mark) & (mark < ends) & (mark < until)
        own = found.reply if is_reply[i] else found.others
        own[:] |= (begins < end) & (ends > begin) & (begins < ends)
        found.others[:] |= closing & (not is_reply[i])
        if is_reply[i]:
            found.closing[:] |= closing
            found.either[:] |= ((begins < begin) & (ends > begin)) | (is_blank & (begins >= end) & (ends <= until))
        if is_reply[i + 1 : i + 2] == [True]:
            found.header[:] |= (begins >= end) & (ends <= until) & ~closing
    found.either[:] = (found.either & ~found.closing) | (begins == ends)
    return found


def mask_claim(tokens: Sequence[str], flags: Array, spans: Sequence[tuple[int, int]], case: Chat) -> Claim:
    """Compare the labels of a conversation with the right ones."""
    roles = [role for role, _ in case.turns]
    found, replies = expect(tokens, spans, roles), roles.count("assistant")
    strict = found.reply | found.closing
    right = np.where(found.either, flags, strict)
    if (right == flags).all() and found.closing.sum() == replies:
        return Claim("the labelled text")
    extra, missing = flags & ~right, right & ~flags
    number = np.cumsum(found.closing) - found.closing  # of the reply that a token belongs to or comes before
    causes = {
        "no end token stands after a reply": found.closing.sum() < replies,
        "nothing is learned": not flags.any(),
        "everything is learned": flags.all(),
        "the mask is one token late": (flags[1:] == strict[:-1]).all() and not flags[0],
        "the mask is one token early": (flags[:-1] == strict[1:]).all() and not flags[-1],
        "only the last reply is learned": replies > 1 and (flags == right & (number >= replies - 1)).all(),
        "only the first reply is learned": replies > 1 and (flags == right & (number < 1)).all(),
    }
    if not any(causes.values()):
        causes = {
            "the end token after a reply is not learned": (missing & found.closing).any(),
            "a part of a reply is not learned": (missing & found.reply & ~found.closing).any(),
            "tokens of the user or of the system are learned": (extra & found.others).any(),
            "the header in front of a reply is learned": (extra & found.header).any(),
        }
    shown = f"learned are    {marked(tokens, flags)}\n  accepted are   {marked(tokens, right)}"
    return Claim("the labelled text", shown, frozenset(cause for cause, is_true in causes.items() if is_true))


def marked(tokens: Sequence[str], flags: Array) -> str:
    """Return the text with ⟦ ⟧ around what is learned."""
    pairs = zip(tokens, flags, strict=True)
    return repr("".join(f"⟦{token}⟧" if flag else token for token, flag in pairs).replace("⟧⟦", ""))


def chats(*conversations: Sequence[str], system: str = "") -> Iterator[Chat]:
    """Yield conversations of a user's and an assistant's texts in turn."""
    first = [("system", system)] if system else []
    for contents in conversations:
        turns = [(("user", "assistant")[i % 2], content) for i, content in enumerate(contents)]
        yield Chat((*first, *turns))


STATEMENT = "learned are each reply of the assistant and the end token after it, and nothing else; no text is lost"
HELLO = ("Is it day?", "No, night.")
LONGER = (*HELLO, "And now?", "Now, too.")
SPACES = [f"{before}Yes.{after}" for before in ("", "  \n ") for after in ("", "  ", "\n\n")]
CONVERSATIONS = {
    "turns": (HELLO, LONGER, (*LONGER, "a", "b")),
    "empty": (("Hi.", ""), (*HELLO, "Hi.", ""), ("Hi.", "", *HELLO)),
    "repeats": (("yes", "yes"), ("no", "no no", "no", "no"), ("user", "assistant", "system", "user")),
    "white_space": (*(("Hi.", reply) for reply in SPACES[1:]), ("Hi.", " \n"), (" a ", "\tb\n", "\n", "c")),
    "unicode": (("naïve?", "ça"), ("漢字🙂", "e\u0301 🙂🙂 漢"), ("שלום", "\u2028")),
}
LAWS = (
    *(
        Law("chat_mask", name, STATEMENT, functools.partial(chats, *conversations), chat_mask)
        for name, conversations in CONVERSATIONS.items()
    ),
    Law("chat_mask", "two_replies", STATEMENT, lambda: [Chat((*Chat().turns, ("assistant", "No, night.")))], chat_mask),
    Law("chat_mask", "system", STATEMENT, functools.partial(chats, HELLO, LONGER, system="Be brief."), chat_mask),
)
