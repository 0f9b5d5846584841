#!/usr/bin/env python3
"""Reads token ids, one a line, and prints their text as it comes. usage: print_text.py MODEL_DIR"""
import pathlib
import sys

from tokenizers import Tokenizer


def main():
    tokenizer = Tokenizer.from_file(str(pathlib.Path(sys.argv[1]) / "tokenizer.json"))
    ids, printed = [], ""
    for line in sys.stdin:
        ids.append(int(line))
        text = tokenizer.decode(ids)
        if text.endswith("\ufffd"):  # a character whose last bytes are still to come
            continue
        print(text[len(printed):], end="", flush=True)
        printed = text
    print()


if __name__ == "__main__":
    main()
