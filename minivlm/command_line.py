"""What command lines share: a parser whose complaints are one sentence, and types of numbers."""

from __future__ import annotations

import argparse
from typing import NoReturn

from minivlm.errors import UserError, nearest


class Parser(argparse.ArgumentParser):
    """argparse whose complaints are UserErrors, and which knows the option that a misspelt one was meant to be."""

    def __init__(self, **settings):
        super().__init__(allow_abbrev=False, **settings)

    def parse_args(self, argv: list[str]) -> argparse.Namespace:
        for word in argv:
            if word.startswith("--") and (option := word.partition("=")[0]) not in self._option_string_actions:
                raise UserError(f"unknown option {option}.{nearest(option, self._option_string_actions)}")
        return super().parse_args(argv)

    def error(self, message: str) -> NoReturn:
        raise UserError(f"{message}; see {self.prog} --help.")


def positive(text: str) -> int:
    if not text.isdecimal() or int(text) < 1:
        raise argparse.ArgumentTypeError(f"{text!r} is not a number from 1 upwards")
    return int(text)
