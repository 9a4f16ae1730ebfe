"""The section of a model card that says how a packed checkpoint is loaded, between marks, so that it can come off."""

from __future__ import annotations

from pathlib import Path

BEGIN, END = "<!-- pyprune pack -->\n", "<!-- /pyprune pack -->\n\n"


def section(facts: str, name: str) -> str:
    """What is packed, how it is loaded and how it becomes a plain checkpoint again."""
    return f"""{BEGIN}## Packed

Zeros are not stored: {facts}. A stock loader finds no weights here; load it with

```python
import pyprune

model, tokenizer = pyprune.load("{name}")  # linear layers multiply with the packed weights
```

or write the plain checkpoint, the same to the byte: `pyprune unpack {name} -o DIR`. Loading by `transformers` alone, as
it may stand below, is for that one.

It pays where decoding waits for the weights, that is for few sequences at a time, and the more, the more zeros there
are. Many sequences at once and long prompts are no faster. `pyprune eval {name} --latency` measures it on your machine.
{END}"""


def read(path: Path) -> str:
    """A text of which every byte comes back when it is written: other encodings and line ends too."""
    return path.read_bytes().decode(errors="surrogateescape")


def write(path: Path, text: str) -> None:
    path.write_bytes(text.encode(errors="surrogateescape"))


def with_section(text: str, added: str) -> str:
    """A model card with the section before its first heading of the second level, or at its end."""
    plain = without_section(text)
    place = ("\n" + plain).find("\n## ")
    place = len(plain) if place < 0 else place
    return plain[:place] + added + plain[place:]


def without_section(text: str) -> str:
    """The card as it was before."""
    head, _, rest = text.partition(BEGIN)
    return head + rest.partition(END)[2]


def section_of(folder: Path) -> str:
    """The section in the card of a folder, for a card that is written anew; empty if there is none."""
    readme = folder / "README.md"
    _, mark, rest = (read(readme) if readme.is_file() else "").partition(BEGIN)
    return mark + rest.partition(END)[0] + END if mark else ""
