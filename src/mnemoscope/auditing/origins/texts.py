"""Answers to questions about documents, and how they are asked."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, replace
from pathlib import Path

from mnemoscope.auditing.replies import Form as ReplyForm
from mnemoscope.auditing.replies import replies
from mnemoscope.behaviour import Asking
from mnemoscope.runs.errors import InputError
from mnemoscope.tasks.tables import Row, read_rows


@dataclass(frozen=True)
class Text:
    """A question, a document ("" for none), and an answer to read, as it stands behind the prompt.

    ``group``: texts of one are never in both of two splits; default: the document.
    """

    question: str
    document: str
    answer: str = ""
    group: str = ""


@dataclass(frozen=True)
class Form:
    """How a question is asked about a document, and without one; ``{document}`` and ``{question}`` are filled in."""

    form: str = "{document}\n\n{question}"
    bare: str = "{question}"

    def __post_init__(self) -> None:
        if "{document}" not in self.form or "{question}" not in self.form or "{question}" not in self.bare:
            raise InputError(f"form: {self.form!r} and {self.bare!r}; wanted are {{document}} and {{question}} in them")

    def prompt(self, question: str, document: str) -> str:
        """What is asked; without a document the bare question."""
        if not document.strip():
            return self.bare.replace("{question}", question)
        return self.form.replace("{question}", question).replace("{document}", document)


def asked(asking: Asking, form: Form, text: Text, document: str | None = None) -> list[int]:
    """Tokens of the prompt; ``document``: in place of its own."""
    prompt = form.prompt(text.question, text.document if document is None else document)
    return asking.tokens([asking.text(prompt)])[0]


def read_texts(file: str | Path) -> list[Text]:
    """Texts of a file of rows with ``question`` and ``document``, and ``answer`` where there is one.

    Raises InputError where a field is missing, or no text.
    """

    def read(where: str, row: Row) -> Text:
        question, document, answer = row["question"], row["document"], row.get("answer") or ""
        for field, value in (("question", question), ("document", document), ("answer", answer)):
            if not isinstance(value, str) or not (value.strip() or field == "answer"):
                raise InputError(f"{where}: {field} is {value!r}; a text is wanted")
        return Text(question, document, answer)

    return read_rows(str(file), ("question", "document"), read, option="texts")


def answered(asking: Asking, form: Form, texts: Sequence[Text], tokens: int = 32) -> list[Text]:
    """The same with what the model writes greedily, up to a line's end; without those whose answers are empty.

    Of an answer that is cut at ``tokens`` the last word is left out.
    """
    prompts = [form.prompt(text.question, text.document) for text in texts]
    found = list[Text]()
    for text, reply in zip(texts, replies(asking, ReplyForm("short", tokens=tokens), prompts), strict=True):
        said = reply.text.lstrip()
        line = said.split("\n")[0].rstrip()
        if reply.cut and line == said.rstrip():
            line = line.rpartition(" ")[0].rstrip()
        if line:
            found.append(replace(text, answer=reply.text[: len(reply.text) - len(said)] + line))
    return found
