"""`longattn tokenizer`: byte-pair encoding or WordPiece, trained on text files."""

from __future__ import annotations

from pathlib import Path

import click

from longattn.cli.output import echo
from longattn.errors import InvalidInput
from longattn.files import locked, remove_temporaries, write_text
from longattn.training import clean_documents, train_bpe, train_wordpiece
from longattn.training.text_files import find_texts, read_text
from longattn.training.tokenizers import SPECIAL_TOKENS

__all__ = ["tokenizer"]


@click.command(context_settings={"show_default": True})
@click.argument("paths", nargs=-1, required=True, type=click.Path(path_type=Path))
@click.option(
    "--out", required=True, type=click.Path(dir_okay=False, path_type=Path), help="The tokenizer.json to write."
)
@click.option("--kind", type=click.Choice(["bpe", "wordpiece"]), default="bpe", help="GPT-2's, or BERT's.")
@click.option("--vocab-size", default=8192, help="Token ids, special tokens included.")
@click.option("--files", "name_pattern", default="*", help="Which names to take below folders, such as '*.txt'.")
@click.option("--clean", is_flag=True, help="First normalise the text, and drop noise and doubles; not for code.")
def tokenizer(paths: tuple[Path, ...], out: Path, kind: str, vocab_size: int, name_pattern: str, clean: bool) -> None:
    """Train a tokenizer on text files, or on all files below folders, for `longattn train --tokenizer`."""
    if out.exists():
        raise InvalidInput("--out", "a new file", out)
    found = find_texts(paths, name_pattern, out=out)
    if (warning := found.warning()) is not None:
        echo(f"Warning: {warning}", error=True)
    with locked(out):
        if out.exists():  # another command wrote it since
            raise InvalidInput("--out", "a new file", out)
        remove_temporaries(out)
        texts = map(read_text, found.files)
        documents = clean_documents(texts) if clean else texts
        if kind == "bpe":
            trained = train_bpe(documents, vocab_size, special_tokens=("<|endoftext|>", *SPECIAL_TOKENS))
        else:
            trained = train_wordpiece(documents, vocab_size)
        write_text(out, trained.to_str(pretty=True))
    echo(f"{trained.get_vocab_size()} token ids; saved to {out}")
