"""What the scripts that run a server under the tests' load have in common: its model, its flags, its load."""

import argparse
import pathlib

from tokenizers import Tokenizer

from load import LONG, Load
from tiny_model import write_tiny_model


def load_arguments(doc, seconds):
    """A parser for a load that runs so long by default, with the flags of the server at its end."""
    parser = argparse.ArgumentParser(description=doc.splitlines()[0])
    parser.add_argument("--model", type=pathlib.Path, help="model directory; without it a tiny one with random weights")
    parser.add_argument("--text", type=pathlib.Path, help="what the prompts are cut from; random ids without it")
    parser.add_argument("--seconds", type=int, default=seconds, help="how long the load runs")
    parser.add_argument("--pace", type=float, default=1, help="how many times longer clients wait between two calls")
    return parser


def model_of(options, folder):
    return options.model or write_tiny_model(folder / "tiny-random-model", layers=8)


def load_of(options, target, model):
    return Load(target, ids_of(options.text, model) if options.text else None, options.pace)


def ids_of(text, model):
    ids = Tokenizer.from_file(str(model / "tokenizer.json")).encode(text.read_text()).ids
    assert len(ids) >= LONG, f"{text} has {len(ids)} tokens, less than {LONG}"
    return ids
