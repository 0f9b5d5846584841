#!/usr/bin/env python3
"""Prints a chat prompt as a JSON array of token ids: a text, and a question about it.

    make_prompt.py MODEL_DIR TEXT_FILE QUESTION

The model directory's tokenizer and chat template are used. A text that does not fit into the model's context with room for the
answer is cut at its end, and standard error says so.
"""
import json
import pathlib
import sys

import jinja2.sandbox
from tokenizers import Tokenizer

ANSWER_TOKENS = 128


def render_chat(config, question_with_text):
    """The prompt up to where the assistant's answer begins."""

    def refuse(message):
        raise ValueError(message)

    environment = jinja2.sandbox.ImmutableSandboxedEnvironment(trim_blocks=True, lstrip_blocks=True)
    environment.globals["raise_exception"] = refuse
    template = environment.from_string(config["chat_template"])
    special_tokens = {key: value for key, value in config.items() if key.endswith("_token")}
    messages = [{"role": "user", "content": question_with_text}]
    return template.render(messages=messages, add_generation_prompt=True, **special_tokens)


def main():
    model_dir, text_file, question = pathlib.Path(sys.argv[1]), pathlib.Path(sys.argv[2]), sys.argv[3]
    tokenizer = Tokenizer.from_file(str(model_dir / "tokenizer.json"))
    config = json.loads((model_dir / "tokenizer_config.json").read_text())
    context = json.loads((model_dir / "config.json").read_text())["max_position_embeddings"]

    def ids_of(text):
        return tokenizer.encode(render_chat(config, f"{text}\n\n{question}"), add_special_tokens=False).ids

    text = text_file.read_text()
    room = context - ANSWER_TOKENS - len(ids_of(""))
    ids_of_text = tokenizer.encode(text, add_special_tokens=False).ids
    if len(ids_of_text) > room:
        text = tokenizer.decode(ids_of_text[:room])
        print(f"    {text_file} has {len(ids_of_text)} tokens; the first {room} are used", file=sys.stderr)
    print(json.dumps(ids_of(text)))


if __name__ == "__main__":
    main()
