"""Removes tokens and passwords from texts that are stored or shown."""

import logging
import os
import re

_HIDDEN = "[hidden]"
_SECRET_NAME = re.compile(r"TOKEN|SECRET|PASSWORD|PASSWD|API_?KEY|ACCESS_KEY|CREDENTIAL", re.I)
_SHORTEST = 8
"""Length below which the value of a variable is no secret, but a word such as "none"."""

_PATTERNS = (
    # The user's part of a URL, and signatures among its parameters.
    (re.compile(r"(\w+://)[^/\s@:]*:[^/\s@]+@"), rf"\1{_HIDDEN}@"),
    (
        re.compile(
            r"([?&][^=&\s]*(?:token|secret|password|signature|credential|api_?key)[^=&\s]*=)"
            r"[^&\s\"']+",
            re.I,
        ),
        rf"\1{_HIDDEN}",
    ),
    # Tokens that are recognized by their form: Hugging Face, GitHub, Google, Amazon.
    (re.compile(r"\b(?:hf_|gh[pousr]_|github_pat_|ya29\.|AKIA)[\w.-]{12,}"), _HIDDEN),
    (re.compile(r"-----BEGIN [A-Z ]*PRIVATE KEY-----.*?(?:-----END[^-]*-----|$)", re.S), _HIDDEN),
)


def hide_secrets(text: str) -> str:
    """Returns a text without passwords in URLs, tokens, and secrets of the environment.

    Secrets of the environment are the values of variables such as HF_TOKEN or WANDB_API_KEY; a
    value that is the path of an existing file is none.
    """
    for name, value in os.environ.items():
        if len(value) >= _SHORTEST and value in text and _SECRET_NAME.search(name):
            if not os.path.exists(value):
                text = text.replace(value, _HIDDEN)
    for pattern, replacement in _PATTERNS:
        text = pattern.sub(replacement, text)
    return text


def hide_secrets_in_logs() -> None:
    """Makes what this process logs from now on, libraries included, pass `hide_secrets`.

    Clients of the hub and of buckets log the URLs that they try again, with passwords and
    signatures.
    """
    if logging.getLogRecordFactory() is not _Record:
        logging.setLogRecordFactory(_Record)


class _Record(logging.LogRecord):
    def getMessage(self) -> str:  # noqa: N802
        return hide_secrets(super().getMessage())
