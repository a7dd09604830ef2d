"""The words behind `hanlin serve`: ours, vLLM's and LMDeploy's mean the same."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest

from hanlin.cli import main as main_module
from hanlin.cli import serve as serve_module
from hanlin.cli.serve_flags import adapters_of, seconds_of, size_of, template_of
from hanlin.errors import ConfigError
from hanlin.serve.settings import ServeConfig


@pytest.fixture
def parsed(monkeypatch: pytest.MonkeyPatch) -> Any:
    """The configuration that a command line means, and its exit status."""

    def parse(*words: str) -> ServeConfig:
        got: list[ServeConfig] = []

        def run(config: ServeConfig, level: str) -> int:
            got.append(config)
            return 0

        monkeypatch.setattr(serve_module, "_run", run)
        monkeypatch.setattr("sys.argv", ["hanlin", "serve", *words])
        with pytest.raises(SystemExit) as left:
            main_module.main(["serve", *words])
        assert left.value.code == 0
        return got[0]

    return parse


def test_nothing_said_serves_the_default_model_on_loopback(parsed: Any) -> None:
    config = parsed()
    assert (config.host, config.port, bool(config.keys)) == ("127.0.0.1", 8000, False)
    assert [spec.source for spec in config.models] == [None]


VLLM = (
    "--model internlm/internlm2_5-7b-chat --served-model-name a b --host 0.0.0.0 --port 9 --api-key k1 k2 "
    "--tensor-parallel-size 1 --max-model-len 512 --max-num-seqs 7 --max-num-batched-tokens 300 --dtype bfloat16 "
    "--kv-cache-dtype int8 --enable-lora --lora-modules x=/x y=/y --trust-remote-code --enforce-eager "
    "--enable-auto-tool-choice --tool-call-parser internlm --no-enable-prefix-caching --max-num-queued-reqs 3 "
    "--gpu-memory-utilization 0.92 --quantization awq --chat-template internlm2 --generation-config vllm "
    "--uvicorn-log-level warning --max-logprobs 5 --disable-log-requests"
)
LMDEPLOY = (
    "api_server internlm/internlm2_5-7b-chat --model-name a --server-name 0.0.0.0 --server-port 9 --api-keys k1 k2 "
    "--tp 1 --session-len 512 --max-batch-size 7 --max-prefill-token-num 300 --dtype bfloat16 --quant-policy 8 "
    "--adapters x=/x y=/y --tool-call-parser internlm --backend turbomind --model-format awq --enable-metrics "
    "--cache-max-entry-count 0.5 --rope-scaling-factor 2.0 --chat-template internlm2 --log-level WARNING --proxy-url x"
)


@pytest.mark.parametrize("words", [VLLM, LMDEPLOY], ids=["vllm", "lmdeploy"])
def test_other_servers_command_lines_mean_the_same(parsed: Any, words: str) -> None:
    config = parsed(*words.split())
    assert (config.host, config.port) == ("0.0.0.0", 9)
    assert len(config.keys.keys) == 2 and config.keys.find("k2")
    (spec,) = config.models
    assert spec.source == "internlm/internlm2_5-7b-chat" and spec.name == "a"
    assert dict(spec.adapters) == {"x": "/x", "y": "/y"}
    expected = {"session_len": 512, "max_batch_size": 7, "max_prefill_token_num": 300, "dtype": "bfloat16", "tp": 1}
    assert expected.items() <= dict(spec.options).items()


@pytest.mark.parametrize(("word", "meant"), [("half", "float16"), ("float", "float32"), ("auto", "auto")])
def test_types_by_vllms_names(parsed: Any, word: str, meant: str) -> None:
    assert parsed("--dtype", word).models[0].options["dtype"] == meant


def test_tls_as_lmdeploy_asks_for_it(
    parsed: Any, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    for name in ("certfile", "keyfile"):
        (tmp_path / name).write_text("x")
        monkeypatch.setenv(f"SSL_{name.upper()}", str(tmp_path / name))
    config = parsed("--ssl")
    assert (config.certificate, config.private_key) == (tmp_path / "certfile", tmp_path / "keyfile")
    assert parsed().certificate is None
    monkeypatch.delenv("SSL_KEYFILE")
    with pytest.raises(SystemExit):
        main_module.main(["serve", "--ssl"])
    assert "SSL_KEYFILE" in capsys.readouterr().err


def test_vllms_key_is_a_key(parsed: Any, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("VLLM_API_KEY", "secret")
    assert parsed("--host", "0.0.0.0").keys.find("secret")


def test_what_has_no_effect_is_said(parsed: Any, capsys: pytest.CaptureFixture[str]) -> None:
    parsed("--trust-remote-code", "--swap-space=4")
    told = capsys.readouterr().err
    assert "--trust-remote-code has no effect" in told and "--swap-space has no effect" in told


def test_the_environment_can_say_it_all(parsed: Any, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("HANLIN_SERVE_PORT", "77")
    monkeypatch.setenv("HANLIN_API_KEY", "secret")
    config = parsed("--keep-alive", "5m", "--memory-budget", "2G", "--max-body", "1M")
    assert config.port == 77 and config.keys.find("secret")
    assert (config.keep_alive, config.memory_budget, config.limits.body_bytes) == (300, 2 << 30, 1 << 20)
    assert parsed("--keep-alive", "-1").keep_alive is None


def test_several_models_with_names(parsed: Any, tmp_path: Path) -> None:
    config = parsed("chat=org/model", str(tmp_path), "--weights", "int4")
    assert [(spec.name, spec.source) for spec in config.models] == [("chat", "org/model"), ("", str(tmp_path))]
    assert all(spec.options["weights"] == "int4" for spec in config.models)


def test_everything_wrong_is_said_at_once(capsys: pytest.CaptureFixture[str]) -> None:
    with pytest.raises(SystemExit) as left:
        main_module.main(["serve", "--memory-budget", "much", "--keep-alive", "long", "--adapters", "x"])
    told = capsys.readouterr().err
    assert left.value.code == 1 and "much" in told and "long" in told and "NAME=PATH" in told
    with pytest.raises(SystemExit):
        main_module.main(["serve", "--host", "0.0.0.0", "--port", "99999"])
    told = capsys.readouterr().err
    assert "API key" in told and "99999" in told
    with pytest.raises(SystemExit):
        main_module.main(["serve", "--weights", "int3", "--session-len", "1"])
    told = capsys.readouterr().err
    assert "int3" in told and "session_len" in told


@pytest.mark.parametrize(("text", "value"), [("12G", 12 << 30), ("512M", 512 << 20), ("7", 7), ("1.5 KiB", 1536)])
def test_sizes(text: str, value: int) -> None:
    assert size_of(text) == value


@pytest.mark.parametrize("text", ["", "G", "-1", "1Q", "1e9"])
def test_other_sizes_are_refused(text: str) -> None:
    with pytest.raises(ConfigError):
        size_of(text)


def test_times() -> None:
    assert [seconds_of(text) for text in ("90", "5m", "1.5h", "250ms", "-1")] == [90, 300, 5400, 0.25, -1]
    with pytest.raises(ConfigError):
        seconds_of("soon")


def test_adapters() -> None:
    assert adapters_of('a=/x\n{"name": "b", "path": "/y=z"}') == {"a": "/x", "b": "/y=z"}
    with pytest.raises(ConfigError) as caught:
        adapters_of("a\n=x\n{]\na=1\na=2")
    assert str(caught.value).count("NAME=PATH") == 3 and "twice" in str(caught.value)


def test_lmdeploys_template_files(tmp_path: Path) -> None:
    file = tmp_path / "t.json"
    file.write_text('{"model_name": "internlm2", "meta_instruction": "Be brief."}')
    assert template_of(str(file)) == ("internlm2", "Be brief.")
    assert template_of("chatml") == ("chatml", None)
    file.write_text('{"model_name": "internlm2", "eosys": "x", "user": "y"}')
    with pytest.raises(ConfigError, match="eosys, user"):
        template_of(str(file))
    file.write_text("[")
    with pytest.raises(ConfigError):
        template_of(str(file))
