"""Laws of the label masks of conversations: what of the text that a chat template writes is learned."""

from __future__ import annotations

import functools
from collections.abc import Callable, Iterable, Iterator, Sequence
from dataclasses import dataclass

import numpy as np

from minilora.testing.bounds import Array
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
    tokens, flags = render(case.messages)
    counts = f"found {len(flags)} labels for {len(tokens)} tokens; accepted is one for each"
    yield Claim("the number of labels", "" if len(flags) == len(tokens) else counts)
    spans = find_messages(render, case, "".join(tokens))
    lost = f"found {''.join(tokens)!r}; accepted is every message's text, whole or without white space around, in order"
    yield Claim("the text", "" if spans else lost)
    if spans and len(flags) == len(tokens):
        yield mask_claim(list(tokens), np.array([bool(flag) for flag in flags]), spans, case)


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


def mask_claim(tokens: list[str], flags: Array, spans: list[tuple[int, int]], case: Chat) -> Claim:
    """Compare a mask with the right one: tokens of replies, and the token after each that is not white space.

    Either is accepted of a token that also has the end of the header, and of white space beside the end token.
    """
    text, ends = "".join(tokens), np.cumsum([len(token) for token in tokens])
    begins = ends - [len(token) for token in tokens]
    blank = np.array([not token.strip() for token in tokens])
    replies = [(i, *span) for i, span in enumerate(spans) if case.turns[i][0] == "assistant"]
    right, closing, free = (np.zeros(len(tokens), dtype=bool) for _ in range(3))
    for i, begin, end in replies:
        until = spans[i + 1][0] if i + 1 < len(spans) else len(text)
        mark = end + len(text[end:until]) - len(text[end:until].lstrip())  # the end token's first character
        right |= (begins < end) & (ends > begin)
        closing |= (begins <= mark) & (mark < ends) & (mark < until)
        free |= ((begins < begin) & (ends > begin)) | (blank & (begins >= end) & (ends <= until))
    free |= begins == ends
    expected = np.where(free & ~closing, flags, right | closing)
    if (expected == flags).all():
        return Claim("the labelled text")
    first, final = (replies[which][1:] for which in (0, -1))
    shown = f"learned are   {marked(tokens, flags)}\n  accepted is   {marked(tokens, expected)}"
    extra, missing = flags & ~expected, expected & ~flags
    others = [span for (role, _), span in zip(case.turns, spans, strict=True) if role != "assistant"]
    headers = [(spans[i - 1][1] if i else 0, begin) for i, begin, _ in replies]
    is_after_first, is_before_last = begins > first[1], ends <= final[0]
    several = len(replies) > 1
    true = {
        "nothing is learned": not flags.any(),
        "everything is learned": flags.all(),
        "the mask is one token late": (flags[1:] == expected[:-1]).all() and not flags[0],
        "the mask is one token early": (flags[:-1] == expected[1:]).all() and not flags[-1],
        "only the last reply is learned": several and (flags == (expected & ~is_before_last)).all(),
        "only the first reply is learned": several and (flags == (expected & ~is_after_first)).all(),
    }
    if not any(true.values()):
        true = {
            "the end token after a reply is not learned": (missing & closing).any(),
            "a part of a reply is not learned": (missing & right & ~closing).any(),
            "tokens of the user or of the system are learned": touches(extra, begins, ends, others),
            "the header in front of a reply is learned": touches(extra, begins, ends, headers),
        }
    return Claim("the labelled text", shown, frozenset(cause for cause, holds in true.items() if holds))


def touches(chosen: Array, begins: Array, ends: Array, spans: Iterable[tuple[int, int]]) -> bool:
    return any((chosen & (begins < end) & (ends > begin)).any() for begin, end in spans)


def marked(tokens: list[str], flags: Array) -> str:
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
    Law("chat_mask", "system", STATEMENT, functools.partial(chats, HELLO, LONGER, system="Be brief."), chat_mask),
)
