"""API keys: where they come from, that they are compared whole, and their rates."""

from __future__ import annotations

from pathlib import Path

import pytest

from hanlin.errors import ConfigError
from hanlin.serve import keys
from hanlin.serve.keys import Key, KeyRing, Rates


def test_keys_come_from_hand_file_and_environment(tmp_path: Path) -> None:
    file = tmp_path / "keys"
    file.write_text("# a comment\nalice:s3cret 60 1000\nbob:other - 50\n\nplain\n")
    ring = KeyRing.read(given=["hand"], file=file, environment={"HANLIN_API_KEY": "env", "HANLIN_API_KEYS": "x:1,y:2"})
    assert [key.name for key in ring.keys] == ["key-1", "key-2", "x", "y", "alice", "bob", "key-7"]
    alice, bob = ring.find("s3cret"), ring.find("other")
    assert alice is not None and (alice.requests_per_minute, alice.tokens_per_minute) == (60, 1000)
    assert bob is not None and (bob.requests_per_minute, bob.tokens_per_minute) == (None, 50)
    assert ring.find("env") and ring.find("plain") and ring.find("hand")
    for wrong in ("", "s3cre", "s3crett", "alice:s3cret", "\ud800"):
        assert ring.find(wrong) is None


def test_no_key_asks_for_none() -> None:
    assert not KeyRing.read()
    assert KeyRing.read(given=["a"])


def test_what_is_wrong_is_named_at_once_without_secrets(tmp_path: Path) -> None:
    file = tmp_path / "keys"
    file.write_text("a b:SECRET1 x\nok:SECRET2 -5\nname:SECRET3 1 2 3\n!:SECRET4\nsame:K\nsame:L\n")
    with pytest.raises(ConfigError) as caught:
        KeyRing.read(file=file)
    text = str(caught.value)
    assert "line 2" in text and "line 3" in text and "line 4" in text and "same name" in text
    assert "SECRET" not in text
    with pytest.raises(ConfigError, match="cannot be read"):
        KeyRing.read(file=tmp_path / "none")
    with pytest.raises(ConfigError, match="same key"):
        KeyRing.read(given=["a:x", "b:x"])


def test_secrets_are_not_kept() -> None:
    ring = KeyRing.read(given=["name:topsecret"])
    assert "topsecret" not in repr(ring) and b"topsecret" not in ring.keys[0].digest


def test_rates_hold_a_minutes_worth(monkeypatch: pytest.MonkeyPatch) -> None:
    now = 100.0
    monkeypatch.setattr(keys.time, "monotonic", lambda: now)
    rates, key = Rates(), Key(name="k", requests_per_minute=2, tokens_per_minute=60)
    assert rates.take_request(key) == 0 and rates.take_request(key) == 0
    assert rates.take_request(key) == pytest.approx(30)
    now += 30
    assert rates.take_request(key) == 0
    rates.spend(key, 90)  # what is running is not cut
    now += 60  # the tokens are at 30 again
    assert rates.take_request(key) == 0
    rates.spend(key, 90)
    assert rates.take_request(key) == pytest.approx(61)
    other = Key(name="other", requests_per_minute=1)
    assert rates.take_request(other) == 0
    unlimited = Key(name="free")
    assert all(rates.take_request(unlimited) == 0 for _ in range(100))
