from __future__ import annotations

import logging

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from pipeline.store.redact import MAX_FOREIGN_CHARACTERS, RedactingFormatter, foreign_text, redact, redacted


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
        ("'http://us'er:hunt'er2@h/x'", "'http://***@h/x'"),
        ('http://u:hun"ter2@h/x and', "http://***@h/x and"),
        ("http://u:hun<ter2@h/x", "http://***@h/x"),
        ("http://u:hun ter2@h/x", "http://***@h/x"),
        ("http://u:hun/ter2@h/x", "http://***@h/x"),
        ("http://u:hun@ter/2@h/x", "http://***@h/x"),
        ("http://u:12/34@h/x", "http://***@h/x"),
        ("http:/u:hunter2@h/x", "http:/***@h/x"),
        ("http:u:hunter2@h/x", "http:***@h/x"),
        ("http:///u:hunter2@h/x", "http:///***@h/x"),
        ("s3:/key:hunter2@bucket/x?sig=a", "s3:/***@bucket/x?sig=***"),
        ("http://h/x?token=a'b c", "http://h/x?token=*** c"),
        ("https://host/a@2x.png", "https://host/a@2x.png"),
        ("https://host.net:8080/a@2x.png, ask me@b.c", "https://host.net:8080/a@2x.png, ask me@b.c"),
        ("http://[::1]:80/@x", "http://[::1]:80/@x"),
        ("'https://host:80': gone; ask a@b.c", "'https://host:80': gone; ask a@b.c"),
        ("<a href='http://host'>a@b.c</a>", "<a href='http://host'>a@b.c</a>"),
        ("s3://arn:aws:s3:eu:1:accesspoint:n/a@2x.png", "s3://arn:aws:s3:eu:1:accesspoint:n/a@2x.png"),
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


def test_what_others_say_is_one_short_line_without_credentials() -> None:
    assert foreign_text('Invalid bucket name "key:hunter2@bucket"') == 'Invalid bucket name "***@bucket"'
    assert foreign_text("gone\n\tat 12:30, http://u:hunter2@h/") == "gone at 12:30, http://***@h/"
    assert foreign_text("\x1b[31mred\x00") == "\N{REPLACEMENT CHARACTER}[31mred\N{REPLACEMENT CHARACTER}"
    assert len(foreign_text("x" * 10**5)) == MAX_FOREIGN_CHARACTERS + 4
