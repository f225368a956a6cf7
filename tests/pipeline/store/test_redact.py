from __future__ import annotations

import logging

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from pipeline.store.redact import RedactingFormatter, redact, redacted


@pytest.mark.parametrize(
    ("text", "shown"),
    [
        ("no address, a@b.c, k=v", "no address, a@b.c, k=v"),
        ("s3://bucket/a b/1.png", "s3://bucket/a b/1.png"),
        ("https://host:8080/1.png?w=400&id=17#top", "https://host:8080/1.png?w=400&id=17#top"),
        ("photo https://me:hunter2@host/1.png: gone", "photo https://***@host/1.png: gone"),
        ("https://ghp_abc@host/1.png", "https://***@host/1.png"),
        ("https://me:p@ss@host/1.png", "https://***@host/1.png"),
        ("s3://AKIA:secret@bucket/1.png", "s3://***@bucket/1.png"),
        ("abfss://container@account.dfs.core.windows.net/1.png", "abfss://container@account.dfs.core.windows.net/1.png"),
        (
            "url='https://b.s3.amazonaws.com/1.png?X-Amz-Date=2026&X-Amz-Credential=AK/x&X-Amz-Signature=0f'",
            "url='https://b.s3.amazonaws.com/1.png?X-Amz-Date=2026&X-Amz-Credential=***&X-Amz-Signature=***'",
        ),
        ("https://a.blob.core.windows.net/c/1.png?sv=2024&sig=abc%3D", "https://a.blob.core.windows.net/c/1.png?sv=2024&sig=***"),
        ("https://host/1.png?x=0123456789abcdef0123456789", "https://host/1.png?x=***"),
        ("https://host/1.png#access_token=a", "https://host/1.png#access_token=***"),
        ("one https://a:b@c/ two https://d:e@f/", "one https://***@c/ two https://***@f/"),
    ],
)  # fmt: skip
def test_only_credentials_are_hidden(text: str, shown: str) -> None:
    assert redact(text) == shown
    assert redact(shown) == shown


@settings(max_examples=100)
@given(
    user=st.text("abcXYZ019-._~!$&()*+,;=%", min_size=1),
    host=st.from_regex(r"[a-z]{1,9}(:[0-9]{1,4})?", fullmatch=True),
    name=st.sampled_from(["sig", "X-Amz-Signature", "access_token", "Key", "x-auth"]),
)  # fmt: skip
def test_a_password_or_signature_is_never_left(user: str, host: str, name: str) -> None:
    shown = redact(f"in https://{user}:SeCrEt@{host}/a.png?w=1&{name}=SeCrEt, and so on")
    assert "SeCrEt" not in shown
    assert f"{host}/a.png?w=1&{name}=" in shown


def test_nested_values_and_logs() -> None:
    tree = {"a": ["https://u:p@h/", 1, None], "b": {"c": ("https://u:p@h/",)}}
    assert redacted(tree) == {"a": ["https://***@h/", 1, None], "b": {"c": ("https://***@h/",)}}
    record = logging.LogRecord("n", logging.INFO, "", 1, "cannot read %s", ("https://u:p@h/x",), None)
    assert RedactingFormatter("%(message)s").format(record) == "cannot read https://***@h/x"
