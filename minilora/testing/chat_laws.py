"""Laws of the label masks of conversations: what of the text that a chat template writes is learned."""

import copy
import functools
import re
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from itertools import cycle, pairwise
from typing import Any

import numpy as np

from minilora.testing.compare import Array
from minilora.testing.laws import Comparison, Law, NotApplicable, claim


@dataclass(frozen=True)
class Chat:
    """A conversation: pairs of role and content, and the `messages` that they are."""

    turns: tuple[tuple[str, str], ...] = (("user", "Hi."), ("assistant", "Yes."))

    @property
    def messages(self) -> list[dict[str, str]]:
        return [{"role": role, "content": content} for role, content in self.turns]

    def is_reply(self, i: int) -> bool:
        """Whether a message is a reply of the assistant, and not in front of the first question."""
        return self.turns[i][0] == "assistant" and any(role == "user" for role, _ in self.turns[:i])


@dataclass(frozen=True)
class MarkedWords:
    """A conversation of any messages, in which words that occur once should be learned, or only read.

    A word of `optional` may be left out by the template, as the reasoning of earlier turns is; if it is there, it is
    learned, or only read if it is in `read` as well. With `may_fail` the template may refuse the conversation.
    """

    messages: tuple[dict[str, Any], ...]
    learned: tuple[str, ...]
    read: tuple[str, ...]
    optional: tuple[str, ...] = ()
    may_fail: bool = False


Render = Callable[[list[dict[str, Any]]], tuple[Sequence[str], Sequence[bool]]]


def chat_mask(render: Render, case: Chat) -> Iterator[Comparison]:
    messages = case.messages
    tokens, flags = render(messages)
    changed = f"found {messages} after the call; accepted is what was given" if messages != case.messages else ""
    yield claim("messages, which are only read,", changed)
    counts = f"found {len(flags)} labels for {len(tokens)} tokens; accepted is one for each"
    yield claim("the number of labels", "" if len(flags) == len(tokens) else counts)
    spans = find_messages(render, case, "".join(tokens))
    if len(spans) < len(case.turns):
        lost = f"{case.turns[len(spans)][1]!r} or what follows it is lost or changed"
        accepted = "accepted is every text, whole or without white space around, in order"
        yield claim("the text", f"found {''.join(tokens)!r}, in which {lost}; {accepted}")
    elif len(flags) == len(tokens):
        right, is_closed = right_labels(tokens, flags, spans, case)
        unclosed = f"found {''.join(tokens)!r}; accepted is an end token after each reply"
        yield claim("the end tokens", "" if is_closed else unclosed)
        shown = f"learned are    {bracketed(tokens, flags)}\n  accepted are   {bracketed(tokens, right)}"
        yield claim("the labelled text", "" if right == [bool(flag) for flag in flags] else shown)


def marked_words(render: Render, case: MarkedWords) -> Iterator[Comparison]:
    try:
        tokens, flags = render(copy.deepcopy(list(case.messages)))
    except Exception:
        if case.may_fail:
            return
        raise
    text, (begins, ends) = "".join(tokens), bounds(tokens)
    for word in (*case.learned, *case.read, *case.optional):
        begin, end = text.find(word), text.find(word) + len(word)
        if begin < 0:
            lost = "" if word in case.optional else f"found {text!r}; accepted is a text with {word!r}"
            yield claim(f"the word {word}", lost)
            continue
        is_learned = np.array(flags, dtype=bool)[(begins < end) & (ends > begin)]
        is_right = is_learned.any() == is_learned.all() == (word not in case.read)
        wanted = "only read" if word in case.read else "learned"
        shown = f"found {bracketed(tokens, flags)}; accepted is that {word!r} is {wanted}"
        yield claim(f"the word {word}", "" if is_right else shown)


def opening(render: Render, case: Chat) -> Iterator[Comparison]:
    text = "".join(render(case.messages)[0])
    for (_, begin), (end, _) in pairwise(find_messages(render, case, text)):
        question = {"role": "user", "content": f"What is {text[begin:end]}Qa, please?"}
        messages = (question, {"role": "assistant", "content": "Qb."})
        yield from marked_words(render, MarkedWords(messages, learned=("Qb",), read=("Qa",)))


def closing(render: Render, case: Chat) -> Iterator[Comparison]:
    messages = (case.messages[0], {"role": "assistant", "content": f"Qa, and {end_token(render)} Qb."})
    yield from marked_words(render, MarkedWords(messages, learned=("Qa", "Qb"), read=()))


def end_token(render: Render) -> str:
    """Return the token after a reply, or "" if the text is not found."""
    tokens, _ = render(Chat().messages)
    spans = find_messages(render, Chat(), "".join(tokens))
    pairs = zip(tokens, bounds(tokens)[1], strict=True)
    return next((token for token, end in pairs if spans and end > spans[-1][1] and token.strip()), "")


def unusual(render: Render, case: Chat) -> Iterator[Comparison]:
    """Compare a conversation that a template may refuse, and from which it may leave out what is only read."""
    learned = tuple(content for i, (_, content) in enumerate(case.turns) if case.is_reply(i))
    read = tuple(content for role, content in case.turns if role != "assistant")
    words = list(marked_words(render, MarkedWords(tuple(case.messages), learned, read, read, may_fail=True)))
    yield from words
    if words and len(find_messages(render, case, "".join(render(case.messages)[0]))) == len(case.turns):
        yield from chat_mask(render, case)


def two_replies(render: Render, case: Chat) -> Iterator[Comparison]:
    """Compare a conversation with two replies or two questions in a row, which a template may refuse."""
    try:
        render(case.messages)
    except Exception:
        return
    yield from chat_mask(render, case)


def calls_of_tools(render: Render, case: MarkedWords) -> Iterator[Comparison]:
    """Compare the words of a conversation, and the labels of the end tokens between a call and its results."""
    words = list(marked_words(render, case))
    yield from words
    tokens, flags = render(copy.deepcopy(list(case.messages))) if words else ([], [])
    text, end, begins = "".join(tokens), end_token(render), bounds(tokens)[0]
    learned = "".join(token if flag else " " for token, flag in zip(tokens, flags, strict=True))
    empty = re.search(r"(?<!: )\b(None|null)\b", learned)
    said = f"found {bracketed(tokens, flags)}; accepted is no {empty[0]!r}, which no message has" if empty else ""
    yield claim("an empty content", said)
    for call, result in (("Qc", "Qd"), ("Qh", "Qi")):
        found = text.find(end, text.find(call), text.find(result)) if end and call in text else -1
        if found >= 0:
            own = np.flatnonzero(begins <= found)[-1]
            shown = f"found {bracketed(tokens, flags)}; accepted is that the {end!r} behind a call is learned"
            yield claim("the end token of a call", "" if flags[own] else shown)


def find_messages(render: Render, case: Chat, text: str) -> list[tuple[int, int]]:
    """Return where each message's content is in the text, in order, up to the first that is not found.

    The text between them is known from the same conversation with other words.
    """
    names = [f"Qz{i}zQ" for i in range(len(case.turns))]
    renamed = [{**message, "content": name} for message, name in zip(case.messages, names, strict=True)]
    rest = "".join(render(renamed)[0])
    pieces = []
    for name in names:
        piece, _, rest = rest.partition(name)
        pieces.append(piece)
    pieces, end = [*pieces[1:], rest], len(pieces[0])
    spans: list[tuple[int, int]] = []
    for (_, content), after in zip(case.turns, pieces, strict=True):
        ways = (content, content.strip(), content.lstrip(), content.rstrip())
        kept = next((way for way in ways if text.startswith(way + after, end)), None)
        if kept is None:
            return spans
        spans.append((end, end + len(kept)))
        end += len(kept) + len(after)
    return spans if end == len(text) else spans[:-1]


def right_labels(
    tokens: Sequence[str], flags: Sequence[bool], spans: Sequence[tuple[int, int]], case: Chat
) -> tuple[list[bool], bool]:
    """Return the labels that are right, and whether each reply has an end token.

    The end token is that of the first character after a reply that is not white space. Where both labels are right, it
    is that of `flags`: of white space next to an end token, of a token with the ends of a header and the beginning of a
    reply, and of a reply in front of the first question.
    """
    text, (begins, ends) = "".join(tokens), bounds(tokens)
    is_blank, given = np.array([not token.strip() for token in tokens]), np.array(flags, dtype=bool)
    reply, closing, either = (np.zeros(len(tokens), dtype=bool) for _ in range(3))
    is_closed, marks = True, list[str]()
    for i, (begin, end) in enumerate(spans):
        own = (begins < end) & (ends > begin)
        if case.is_reply(i) or (case.turns[i][0] == "assistant" and given[own].any()):
            until = spans[i + 1][0] if i + 1 < len(spans) else len(text)
            mark = end + len(text[end:until]) - len(text[end:until].lstrip())
            mark_token = (begins <= mark) & (mark < ends) & (mark < until)
            is_closed &= bool(mark_token.any())
            marks += [token for token, is_mark in zip(tokens, mark_token, strict=True) if is_mark]
            reply |= own
            closing |= mark_token
            is_behind = (begins if end > begin else ends) >= end  # of an empty reply, white space before it as well
            either |= ((begins < begin) & (ends > begin)) | (is_blank & is_behind & (ends <= until))
    either = (either & ~closing) | (begins == ends)
    is_opening = [mark in text[: spans[0][0]] for mark in marks]
    is_closed &= not any(is_opening) or is_opening[-1]  # a header's token ends no reply, if another one ends the last
    return np.where(either, given, reply | closing).tolist(), is_closed


def bounds(tokens: Sequence[str]) -> tuple[Array, Array]:
    """Return where each token begins in the text, and where it ends."""
    ends = np.cumsum([0, *map(len, tokens)])
    return ends[:-1], ends[1:]


def in_its_template(render: Render, mistake: Callable[..., Any], case: Chat) -> Render:
    """Return a mistake of the catalogue, made in a rendering that has the right labels."""

    def corrected(messages: list[dict[str, str]]) -> tuple[Sequence[str], Sequence[bool]]:
        tokens, flags = render(messages)
        own = Chat(tuple((message["role"], message["content"]) for message in messages))
        spans = find_messages(render, own, "".join(tokens))
        right, is_closed = right_labels(tokens, flags, spans, own)
        if len(spans) < len(own.turns) or not is_closed:
            raise NotApplicable("what is wrong is the text, and not its labels")
        return tokens, right

    return functools.partial(mistake, render=corrected)


def bracketed(tokens: Sequence[str], flags: Sequence[bool]) -> str:
    """Return the text with ⟦ ⟧ around what is learned."""
    pairs = zip(tokens, flags, strict=True)
    return repr("".join(f"⟦{token}⟧" if flag else token for token, flag in pairs).replace("⟧⟦", ""))


def chats(*conversations: Sequence[str]) -> list[Chat]:
    """Return conversations of a user's and an assistant's texts in turn."""
    return [Chat(tuple(zip(cycle(("user", "assistant")), texts, strict=False))) for texts in conversations]


LONG = [f"I have seen {i} words." for i in range(60)]
STATEMENT = "learned are each reply of the assistant and the end token after it, and nothing else; no text is lost"
HELLO = ("Is it day?", "No, night.")
LONGER = (*HELLO, "And now?", "Now, too.")
SPACES = [f"{before}Yes.{after}" for before in ("", "  \n ") for after in ("", "  ", "\n\n")]
CONVERSATIONS = {
    "turns": chats(HELLO, LONGER, (*LONGER, "a", "b"), (" ".join(LONG), " ".join(LONG)), LONG[:16]),
    "empty": chats(("Hi.", ""), (*HELLO, "Hi.", ""), ("Hi.", "", *HELLO)),
    "repeats": chats("aa", ("no", "no no", "no", "no"), "abba", "abcb", ("user", "assistant", "system", "user")),
    "white_space": chats(*(("Hi.", reply) for reply in SPACES[1:]), ("Hi.", " \n"), (" a ", "\tb\n", "\n", "c")),
    "unicode": chats(("naïve?", "ça"), ("漢字🙂", "e\u0301 🙂🙂 漢"), ("שלום", "\u2028")),
    "code": chats(("3 < 4 & \"a\" > 'b'?", "{x} {{ y }} {% z %} %s \\n"), ("if x:\n\ty\n", "a:\n    b\n\n\n  c")),
    "system": [Chat((("system", "Be brief."), *case.turns)) for case in chats(HELLO, LONGER)],
}
_USER, _REPLY, _NEXT, _LAST = ("user", "Qa?"), ("assistant", "Qb."), ("user", "Qc?"), ("assistant", "Qd.")
TWO = [Chat((*Chat().turns, ("assistant", "No, night."))), Chat((("user", "Is it day?"), *Chat().turns))]
UNUSUAL = [
    Chat((_USER, _REPLY, _NEXT)),
    Chat((_REPLY, _NEXT, _LAST)),
    Chat((_USER, _REPLY, ("system", "Qs."), _NEXT, _LAST)),
    Chat((_USER, _REPLY, _NEXT, ("system", "Qs."), _LAST)),
    Chat((_USER, ("critic", "Qs."), _REPLY)),
    Chat((_USER, _NEXT, _REPLY, ("developer", "Qs."), _LAST)),
    Chat((("system", "Qs."), _REPLY, _NEXT, _LAST)),
]
_THOUGHTS = ("Is it Qa?", "<think>\nQb\n</think>\n\nNo, Qc.", "And Qd?", "<think>\nQe\n</think>\n\nQf, too.")
REASONING = MarkedWords(tuple(chats(_THOUGHTS)[0].messages), ("Qc", "Qf"), read=("Qa", "Qd"), optional=("Qb", "Qe"))


def with_calls(
    *rounds: Sequence[tuple[str, str]], content: str | None = "", has_more: bool = False, **options: Any
) -> MarkedWords:
    """Return a question, calls of a tool in each round, with what they ask for and what they give, and a reply."""
    more = {"Qj": 4907, "Qk": ["Ql", 3806]} if has_more else {}
    messages: list[dict[str, Any]] = [{"role": "user", "content": "Is it warm in Qa?"}]
    for pairs in rounds:
        ids = [f"call0000{len(messages) + i}" for i in range(len(pairs))]
        calls = [
            {"id": own, "type": "function", "function": {"name": "Qb", "arguments": {"city": city, **more}}}
            for own, (city, _) in zip(ids, pairs, strict=True)
        ]
        messages.append({"role": "assistant", "content": content, "tool_calls": calls})
        for own, (_, result) in zip(ids, pairs, strict=True):
            messages.append({"role": "tool", "content": f"{result} degrees", "tool_call_id": own, "name": "Qb"})
    messages.append({"role": "assistant", "content": "Qe, it is."})
    asked, given = zip(*(pair for pairs in rounds for pair in pairs), strict=True)
    words = ("Qb", *asked, *re.findall(r"\w+", str(more)), "Qe, it is.")
    return MarkedWords(
        tuple(messages), words, ("Is it warm in Qa?", *(f"{result} degrees" for result in given)), **options
    )


_FIRST, _SECOND = ("Qc", "Qd"), ("Qh", "Qi")
TOOLS = [
    with_calls([_FIRST]),
    with_calls([_FIRST], has_more=True),
    with_calls([_FIRST], content=None, may_fail=True),
    with_calls([_FIRST], content="Qf.", optional=("Qf",)),
    with_calls([_FIRST], [_SECOND]),
    with_calls([_FIRST, _SECOND], may_fail=True),
]
ROLES = f"{STATEMENT}, with any roles in any order; a template may refuse them, or leave out what is read"
IN_A_ROW = f"{STATEMENT}; a template may refuse two replies, or two questions, in a row"
ENDED = "a reply that quotes what ends a reply is learned up to its own end"
QUOTED = "a question that quotes what opens a reply in its template is not learned"
THINKING = "replies with reasoning, which a template may drop, are learned; questions are not"
CALLING = "calls of tools and replies are learned, questions and results are not; no text is lost, except beside a call"
LAWS = (
    *(Law("chat_mask", name, STATEMENT, cases, chat_mask, in_its_template) for name, cases in CONVERSATIONS.items()),
    Law("chat_mask", "two_replies", IN_A_ROW, TWO, two_replies, in_its_template),
    Law("chat_mask", "roles", ROLES, UNUSUAL, unusual, in_its_template),
    Law("chat_mask", "opening", QUOTED, CONVERSATIONS["turns"][:1], opening, in_its_template),
    Law("chat_mask", "closing", ENDED, CONVERSATIONS["turns"][:1], closing, in_its_template),
    Law("chat_mask", "reasoning", THINKING, [REASONING], marked_words),
    Law("chat_tools", "calls", CALLING, TOOLS, calls_of_tools),
)
