"""Quantising: each method against rounding, every format read back, interruption, and the command line."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from safetensors.torch import load_file, save_file

import chatglm2_directory
import chatglm_directory
import hanlin
from hanlin.checkpoints.load import load_model
from hanlin.checkpoints.quantisation import read_quantisation
from hanlin.checkpoints.quantised import QuantisedSource
from hanlin.checkpoints.row_quantised import RowQuantisedSource
from hanlin.checkpoints.source import open_source
from hanlin.cli.main import main
from hanlin.compress.calibration import Windows, read_windows
from hanlin.compress.formats import FORMATS, Format, configuration, tensors
from hanlin.compress.grid import Grid
from hanlin.compress.methods import Inputs, balancing, output_error, smoothing
from hanlin.compress.quantise import Settings, quantise
from hanlin.compress.rounding import found, passed_on, refined
from hanlin.errors import CheckpointError, ConfigError
from hanlin.layers.attend import PackedAttend
from hanlin.layers.rope import Positions
from hanlin.tokenizers import load_tokenizer
from hf_directory import make_directory
from quantised_files import stream

SIZES = {"hidden_size": 64, "intermediate_size": 96, "num_hidden_layers": 2}


@pytest.fixture
def layer() -> tuple[torch.Tensor, Inputs]:
    """A weight (48, 96) and inputs of which a few channels are far louder than the rest, as in real models."""
    generator = torch.Generator().manual_seed(0)
    x = torch.randn(400, 96, generator=generator) @ (torch.randn(96, 96, generator=generator) / 10 + torch.eye(96))
    x[:, ::17] *= 30
    inputs = Inputs(96)
    inputs.add(x[:150])
    inputs.add(x[150:])
    torch.testing.assert_close(inputs.gram, x.t() @ x, rtol=1e-3, atol=1e-1)
    return torch.randn(48, 96, generator=generator), inputs


@pytest.mark.parametrize("symmetric", [True, False])
@pytest.mark.parametrize(("bits", "group"), [(4, 32), (8, 64)])  # 64: the last group has 32 columns
def test_rounding_is_off_by_half_a_step_at_most(bits: int, group: int, symmetric: bool, layer: Any) -> None:
    grid = Grid(bits=bits, group=group, symmetric=symmetric)
    weight, _ = layer
    quantised = grid.quantise(weight)
    assert quantised.scales.shape == (48, grid.count(96)) and torch.equal(quantised.scales, quantised.scales.half())
    values = grid.values(quantised)
    assert torch.equal(values, grid.nearest(weight))
    step = quantised.scales.repeat_interleave(group, 1)[:, :96]
    # Of the zero point's rounding, and of the symmetric grid's missing code, the ends of a group may suffer.
    inner = (quantised.codes > 0) & (quantised.codes < (1 << bits) - 1)
    assert float(((values - weight).abs() / step)[inner].max()) <= 0.5001
    assert float(((values - weight).abs() / step).max()) <= 1.01


def test_calibrated_methods_keep_outputs_better_than_rounding(layer: Any) -> None:
    weight, inputs = layer
    grid = Grid(bits=4, group=32)

    def cost(values: torch.Tensor) -> float:
        return output_error(values - weight, inputs.gram)

    rounded = cost(grid.nearest(weight))
    factors = smoothing([weight], inputs, grid)
    smooth = cost(grid.nearest(weight * factors) / factors)
    passed = passed_on(weight, inputs.damped(), grid)
    again = refined(weight, inputs.damped(), grid, passed)
    assert smooth < 0.7 * rounded and cost(grid.values(passed)) < 0.5 * rounded
    assert cost(grid.values(again)) < cost(grid.values(passed))
    assert torch.equal(again.scales, again.scales.half()) and torch.equal(again.zeros, passed.zeros)


@pytest.mark.parametrize(("symmetric", "least_zero"), [(False, 0), (False, 1), (True, 0)])
def test_scales_and_zero_points_are_nearly_the_best_there_are(symmetric: bool, least_zero: int) -> None:
    """Against every zero point with 400 widths, for groups whose minimum is on no grid with whole zero points."""
    generator = torch.Generator().manual_seed(1)
    grid = Grid(bits=4, group=16, symmetric=symmetric, least_zero=least_zero)
    blocks = torch.randint(0, 16, (40, 16), generator=generator) * 0.1 - torch.rand(40, 1, generator=generator) * 1.5
    x = torch.randn(100, 16, generator=generator) + 0.5  # the inputs' mean makes common displacements dear
    own = x.t() @ x

    def cost(scales: torch.Tensor, zeros: torch.Tensor) -> torch.Tensor:
        codes = grid.round(blocks, scales, zeros)
        off = (codes - zeros[:, None]) * scales[:, None] - blocks
        return ((off @ own) * off).sum(1)

    low, high = grid.range(blocks)
    best = torch.full((40,), torch.inf)
    for width in torch.linspace(0.5, 1.1, 400):
        scales = grid.storable((high - low) * width / 15)
        for zero in (8,) if symmetric else range(least_zero, 16):
            best = torch.minimum(best, cost(scales, torch.full((40,), float(zero))))
    scales, zeros = found(blocks, own, grid)
    own_cost = cost(scales, zeros)
    assert torch.equal(scales, scales.half()) and float(zeros.min()) >= least_zero and float(zeros.max()) <= 15
    assert float((own_cost / best).median()) < 1.2 and float(own_cost.sum()) < 1.3 * float(best.sum())
    assert float(own_cost.sum()) < 0.8 * float(cost(*(part[:, 0] for part in grid.fit(blocks[:, None]))).sum())


def test_codes_and_scales_cannot_be_bettered_one_by_one(monkeypatch: Any) -> None:
    """Brute force: no other code of any one column, nor any other scale of one group, lowers the error."""
    generator = torch.Generator().manual_seed(2)
    weight = torch.randn(6, 24, generator=generator)
    x = torch.randn(80, 24, generator=generator) @ torch.randn(24, 24, generator=generator)
    inputs, grid = Inputs(24), Grid(bits=4, group=16)  # the last group has 8 columns
    inputs.add(x)
    damped = inputs.damped()
    monkeypatch.setattr("hanlin.compress.rounding._ROUNDS", 12)
    made = refined(weight, damped, grid, passed_on(weight, damped, grid))

    def costs(codes: torch.Tensor, scales: torch.Tensor) -> torch.Tensor:
        off = (codes - made.zeros.repeat_interleave(16, 1)[:, :24]) * scales.repeat_interleave(16, 1)[:, :24] - weight
        return ((off.double() @ damped) * off).sum(1)

    least = costs(made.codes.float(), made.scales)
    for column in range(24):
        for step in (-1, 1):
            codes = made.codes.float()
            codes[:, column] = (codes[:, column] + step).clamp(0, 15)
            assert bool((costs(codes, made.scales) >= least * (1 - 1e-3)).all())
    for group in range(2):
        for factor in (0.99, 1.01):
            scales = made.scales.clone()
            scales[:, group] *= factor
            assert bool((costs(made.codes.float(), scales) >= least * (1 - 1e-3)).all())


def test_silent_inputs_and_rows_of_zeros_do_no_harm(layer: Any) -> None:
    weight, grid = layer[0].clone(), Grid(bits=4, group=32)
    weight[3] = 0
    for inputs in (Inputs(96), layer[1]):
        gram = inputs.damped()
        made = refined(weight, gram, grid, passed_on(weight, gram, grid))
        values = grid.values(made)
        assert bool((values[3] == 0).all()) and bool(made.scales.isfinite().all()) and bool((made.scales > 0).all())
        if not inputs.count:
            assert float((values - weight).norm()) < 1.1 * float((grid.nearest(weight) - weight).norm())


def test_few_tokens_are_not_trusted_with_many_columns() -> None:
    """The error on other tokens of the same source: fitting 48 tokens exactly would cost more there."""
    generator = torch.Generator().manual_seed(3)
    mix = torch.randn(96, 96, generator=generator) * torch.arange(1, 97) ** -0.7
    mix = mix @ torch.linalg.qr(torch.randn(96, 96, generator=generator))[0]
    weight, grid = torch.randn(64, 96, generator=generator), Grid(bits=4, group=32)
    few, other = Inputs(96), Inputs(96)
    few.add(torch.randn(48, 96, generator=generator) @ mix.t())
    other.add(torch.randn(4000, 96, generator=generator) @ mix.t())
    undamped = few.gram.double()
    undamped.diagonal().add_(1e-3 * undamped.diagonal().mean())
    costs = [
        output_error(grid.values(refined(weight, gram, grid, passed_on(weight, gram, grid))) - weight, other.gram)
        for gram in (few.damped(), undamped)
    ]
    assert costs[0] < 0.9 * costs[1] and costs[0] < 0.6 * output_error(grid.nearest(weight) - weight, other.gram)


def test_columns_taken_at_once_do_not_matter(layer: Any, monkeypatch: Any) -> None:
    weight, inputs = layer
    grid = Grid(bits=4, group=24)
    start = passed_on(weight, inputs.damped(), grid)
    whole = refined(weight, inputs.damped(), grid, start)
    monkeypatch.setattr("hanlin.compress.rounding._COLUMNS", 7)
    monkeypatch.setattr("hanlin.compress.rounding._ROWS", 5)
    parts = refined(weight, inputs.damped(), grid, start)
    assert (whole.codes != parts.codes).float().mean() < 0.002  # sums in another order round another way


@pytest.mark.parametrize(("form", "bits", "symmetric"), [("awq", 4, False), ("gptq", 4, False), ("gptq", 8, True),
    ("compressed-tensors", 4, False), ("compressed-tensors", 4, True), ("compressed-tensors", 8, True)])  # fmt: skip
def test_every_format_reads_back_as_it_was_meant(
    form: Format, bits: int, symmetric: bool, layer: Any, tmp_path: Path
) -> None:
    grid = Grid(bits=bits, group=32, symmetric=symmetric, least_zero=int(form == "gptq"))
    quantised = grid.quantise(layer[0])
    files = tensors(form, grid, quantised)
    save_file({f"a.{end}": tensor for end, tensor in files.items()}, tmp_path / "model.safetensors")
    config = configuration(form, grid, [])
    with open_source(tmp_path) as base:
        source = QuantisedSource(base, read_quantisation(config["quantization_config"], tmp_path))
        assert source.infos["a.weight"].dtype != "FEW_BITS"
        assert torch.equal(source.load("a.weight"), grid.values(quantised))
    # The same once more, packed by what shares nothing with the writer.
    codes, zeros = quantised.codes.numpy(), quantised.zeros.numpy().astype(int)
    if form == "gptq":
        assert torch.equal(files["qweight"], stream(codes, bits).T)
        assert torch.equal(files["qzeros"], stream(zeros.T - 1, bits))
    elif form == "awq":
        swap = np.arange(48).reshape(-1, 8)[:, (0, 2, 4, 6, 1, 3, 5, 7)].reshape(-1)
        assert torch.equal(files["qweight"], stream(codes.T[:, swap], 4))
        assert torch.equal(files["qzeros"], stream(zeros.T[:, swap], 4))
    else:
        assert torch.equal(files["weight_packed"], stream(codes, bits))
        assert ("weight_zero_point" in files) == (not symmetric)


@pytest.mark.parametrize("bits", [4, 8])
def test_rows_are_stored_as_chatglm_releases_them(bits: int, tmp_path: Path) -> None:
    values = chatglm_directory.config()
    dense = {name: tensor.half() for name, tensor in chatglm_directory.weights(values).items()}
    source = chatglm_directory.write(tmp_path / "m", values, dense)
    report = quantise(source, tmp_path / "q", Settings(method="rtn", bits=bits))
    assert report.settings["format"] == "chatglm" and len(report.rows) == 2 * 4
    config = json.loads((tmp_path / "q" / "config.json").read_text())
    assert config["quantization_bit"] == bits and "quantization_config" not in config
    made = load_file(tmp_path / "q" / "model.safetensors")
    wanted = chatglm_directory.quantised({name: tensor.float() for name, tensor in dense.items()}, bits)
    assert set(made) == {name for name in wanted if not name.endswith("inv_freq")}  # which the released code ignores
    for name, tensor in made.items():
        assert tensor.dtype is wanted[name].dtype and torch.equal(tensor, wanted[name]), name
    with open_source(tmp_path / "q") as files:
        name = "transformer.layers.1.mlp.dense_4h_to_h.weight"
        read = RowQuantisedSource(files, bits).load(name)
    error = (read - dense[name].float()).abs().amax(1) / made[f"{name}_scale"].float()
    assert float(error.max()) <= 0.501
    with pytest.raises(ConfigError, match=r"quantised already \(ChatGLM's own\)"):
        quantise(tmp_path / "q", tmp_path / "again", Settings(method="rtn"))
    with pytest.raises(ConfigError, match="ChatGLM-6B takes method rtn without text"):
        quantise(source, tmp_path / "again", Settings(group_size=32), windows=windows())


@pytest.mark.parametrize(
    ("method", "form", "group"), [("rtn", "chatglm", None), ("awq", "awq", 8), ("gptq", "gptq", 8)]
)
def test_chatglm2_takes_every_method(method: Any, form: Format, group: int | None, tmp_path: Path) -> None:
    values = chatglm2_directory.config()
    source = chatglm2_directory.write(tmp_path / "m", values, chatglm2_directory.weights(values))
    ids = np.random.default_rng(0).integers(3, values["padded_vocab_size"] - 1, (4, 16))
    text = None if method == "rtn" else Windows(ids[:3], ids[3:])
    report = quantise(source, tmp_path / "q", Settings(method=method, group_size=group), windows=text)
    assert report.settings["format"] == form and len(report.rows) == 4 * values["num_layers"]
    loaded = load_model(tmp_path / "q", dtype=torch.float32, device=torch.device("cpu"))
    dense = load_model(source, dtype=torch.float32, device=torch.device("cpu"))
    outputs = [
        read.model.head(read.model(torch.from_numpy(ids[3]), Positions(torch.arange(16)[None]), PackedAttend([16])))
        for read in (loaded, dense)
    ]
    assert float((outputs[0] - outputs[1]).norm() / outputs[1].norm()) < 0.3
    if method == "awq":  # up, which is fused with gate, was divided by what down was multiplied by
        norm = "transformer.encoder.layers.0.input_layernorm.weight"
        parameters = [dict(read.model.named_parameters()) for read in (loaded, dense)]
        assert not torch.allclose(parameters[0][norm], parameters[1][norm], atol=1e-3)


def test_smoothquant_evens_out_what_comes_in(tmp_path: Path, layer: Any) -> None:
    weight, inputs = layer
    factors = balancing([weight], inputs)
    loud, columns = inputs.most / factors, (weight * factors).abs().amax(0)
    assert float(loud.max() / loud.min()) < 0.5 * float(inputs.most.max() / inputs.most.min())
    torch.testing.assert_close(loud / loud.mean(), columns / columns.mean(), rtol=1e-3, atol=1e-3)
    source = make_directory(tmp_path / "m", tokenizer="small", **SIZES)
    quantise(source, tmp_path / "q", Settings(method="smoothquant", bits=8), windows=windows())
    config = json.loads((tmp_path / "q" / "config.json").read_text())["quantization_config"]
    assert config["format"] == "int-quantized"
    scheme = config["config_groups"]["group_0"]
    assert scheme["weights"]["strategy"] == "channel" and scheme["input_activations"]["strategy"] == "token"
    made = load_file(tmp_path / "q" / "model.safetensors")
    name = "model.layers.0.attention.wqkv.weight"
    assert made[name].dtype is torch.int8 and made[f"{name}_scale"].shape == (len(made[name]), 1)
    with (
        hanlin.load(tmp_path / "q", weights="float32", cache_bytes=1 << 20) as llm,
        hanlin.load(source, weights="float32", cache_bytes=1 << 20) as dense,
    ):
        ids = windows().evaluation[0].tolist()
        assert llm.score([ids])[0].total == pytest.approx(dense.score([ids])[0].total, rel=0.02)


def windows(count: int = 6) -> Windows:
    ids = np.random.default_rng(0).integers(3, 1400, (count, 24))
    return Windows(ids[:-2], ids[-2:])


@pytest.mark.parametrize(
    ("method", "form", "bits"),
    [("awq", "awq", 4), ("gptq", "gptq", 4), ("rtn", "awq", 4), ("rtn", "compressed-tensors", 8), ("gptq", "gptq", 8)],
)
def test_a_quantised_directory_loads_and_says_nearly_the_same(
    method: Any, form: Format, bits: int, tmp_path: Path
) -> None:
    source = make_directory(tmp_path / "m", tokenizer="small", **SIZES)
    settings = Settings(method=method, bits=bits, group_size=32)
    assert settings.stored == form
    report = quantise(source, tmp_path / "q", settings, windows=windows())
    assert report.perplexity is not None and len(report.rows) == 2 * 5
    before, after = report.perplexity
    assert abs(after / before - 1) < (0.5 if bits == 4 else 0.05)
    config = json.loads((tmp_path / "q" / "config.json").read_text())
    assert config["quantization_config"]["quant_method"] == form and config["torch_dtype"] == "float16"
    assert json.loads((tmp_path / "q" / "quantisation.json").read_text())["settings"]["method"] == method
    # Perplexity by the engine, from the files, is what was measured on the way.
    with hanlin.load(tmp_path / "q", weights="float32", cache_bytes=1 << 20) as llm:
        scores = llm.score([ids.tolist() for ids in windows().evaluation])
    loss = -sum(score.total for score in scores) / sum(len(score.ids) - 1 for score in scores)
    assert np.exp(loss) == pytest.approx(after, rel=2e-3)
    assert not list(tmp_path.glob(".*"))


def test_names_are_the_released_ones_with_the_ends_of_the_format(tmp_path: Path) -> None:
    source = make_directory(tmp_path / "m", tokenizer="small", **SIZES)
    quantise(source, tmp_path / "q", Settings(method="rtn", group_size=32))
    made, old = load_file(tmp_path / "q" / "model.safetensors"), load_file(source / "model.safetensors")
    expected = {name for name in old if "layers" not in name or "norm" in name}
    for name in old.keys() - expected:
        expected |= {name.replace(".weight", f".{end}") for end in ("qweight", "qzeros", "scales")}
    assert set(made) == expected
    assert made["model.layers.0.attention.wqkv.qweight"].shape == (64, 128 // 8)
    assert made["output.weight"].dtype is torch.float16


class StoppedError(Exception):
    pass


def test_interrupted_work_goes_on_and_gives_the_same_bytes(tmp_path: Path) -> None:
    source = make_directory(tmp_path / "m", tokenizer="small", **SIZES)
    settings = Settings(method="awq", group_size=32)
    seen: list[str] = []

    def stop(doing: str, done: int, steps: int) -> None:
        if doing == "layer 0":
            raise StoppedError

    quantise(source, tmp_path / "whole", settings, windows=windows())
    with pytest.raises(StoppedError):
        quantise(source, tmp_path / "parts", settings, windows=windows(), progress=stop)
    assert not (tmp_path / "parts").exists()
    quantise(source, tmp_path / "parts", settings, windows=windows(), progress=lambda doing, *_: seen.append(doing))
    assert "layer 0" not in seen and "layer 1" in seen
    for name in ("model.safetensors", "config.json"):
        assert (tmp_path / "parts" / name).read_bytes() == (tmp_path / "whole" / name).read_bytes()
    # Other settings do not go on with it.
    with pytest.raises(StoppedError):
        quantise(source, tmp_path / "other", settings, windows=windows(), progress=stop)
    seen.clear()
    other = Settings(method="rtn", group_size=32)
    quantise(source, tmp_path / "other", other, windows=windows(), progress=lambda doing, *_: seen.append(doing))
    assert "layer 0" in seen


def test_what_cannot_be_done_is_told_with_the_remedy(tmp_path: Path) -> None:
    source = make_directory(tmp_path / "m", tokenizer="small", **SIZES)
    out = tmp_path / "q"
    with pytest.raises(ConfigError, match=r"(?s)needs text to calibrate on.*--calibration FILE"):
        quantise(source, out, Settings(group_size=32))
    with pytest.raises(ConfigError, match=r"(?s)64 columns.*method 'awq' needs text.*--group-size 32 fits.*--calib"):
        quantise(source, out, Settings(group_size=128))  # all at once
    with pytest.raises(ConfigError, match="ChatGLM's own format is for chatglm and chatglm2, not 'internlm2'"):
        quantise(source, out, Settings(method="rtn", format="chatglm"))
    with pytest.raises(ConfigError, match=r"(?s)smoothquant is for 8 bits.*group_size must be left out.*zero points"):
        Settings(method="smoothquant", group_size=32, symmetric=False)
    with pytest.raises(ConfigError, match=r"(?s)64 columns.*96 columns.*--group-size 32 fits"):
        quantise(source, out, Settings(method="rtn", group_size=128))
    with pytest.raises(ConfigError) as raised:
        Settings(method="x", bits=3, group_size=5, format="y")  # type: ignore[arg-type]
    assert all(word in str(raised.value) for word in ("method", "bits", "group_size", "format"))
    quantise(source, out, Settings(method="rtn", group_size=32))
    with pytest.raises(CheckpointError, match="exists already"):
        quantise(source, out, Settings(method="rtn", group_size=32))
    with pytest.raises(ConfigError, match=r"quantised already \(awq\)"):
        quantise(out, tmp_path / "again", Settings(method="rtn", group_size=32))


def test_a_last_group_may_be_shorter_as_gptq(tmp_path: Path) -> None:
    source = make_directory(tmp_path / "m", tokenizer="small", **SIZES)
    quantise(source, tmp_path / "q", Settings(method="rtn", group_size=64, format="gptq"), windows=windows())
    with open_source(tmp_path / "q") as base:
        config = json.loads((tmp_path / "q" / "config.json").read_text())["quantization_config"]
        infos = QuantisedSource(base, read_quantisation(config, tmp_path)).infos
    assert infos["model.layers.0.feed_forward.w2.weight"].dtype == "INT4_ZERO/32"  # 96 columns: 64 and 32
    assert infos["model.layers.0.feed_forward.w1.weight"].dtype == "INT4_ZERO/64"


def test_calibration_text_comes_from_text_and_lines(tmp_path: Path) -> None:
    tokenizer = load_tokenizer(make_directory(tmp_path / "m", tokenizer="small"))
    text = tmp_path / "a.txt"
    text.write_text("The cat sat on the mat. 你好。\n" * 60, encoding="utf-8")
    found = read_windows(text, tokenizer, samples=3, length=16, measured=2)
    assert found.calibration.shape == (3, 16) and found.evaluation.shape == (2, 16)
    assert found.calibration.flatten().tolist() == tokenizer.encode(text.read_text(encoding="utf-8"))[:48]
    rows = [{"text": "one two three"}, {"messages": [{"role": "user", "content": "four"}, {"content": "five"}]}]
    lines = tmp_path / "a.jsonl"
    lines.write_text("\n".join(json.dumps(row) for row in rows) * 1 + "\n", encoding="utf-8")
    found = read_windows(lines, tokenizer, samples=9, length=4)
    assert "".join(tokenizer.decode(found.calibration.flatten().tolist())).startswith("one two three")
    for content, says in (
        ("{", "line 1: not valid JSON"),
        ('{"a": 1}', "line 1: needs 'text'"),
        ("", "fewer than one"),
    ):
        lines.write_text(content, encoding="utf-8")
        with pytest.raises(ConfigError, match=says):
            read_windows(lines, tokenizer, samples=9, length=4)


def run(capsys: Any, *arguments: str) -> tuple[int, str]:
    with pytest.raises(SystemExit) as left:
        main(arguments)
    return int(left.value.code or 0), "".join(capsys.readouterr())


def test_the_command_line_and_lmdeploys(tmp_path: Path, capsys: Any) -> None:
    source = make_directory(tmp_path / "m", tokenizer="small", **SIZES)
    text = tmp_path / "text.txt"
    text.write_text("The cat sat on the mat and looked at me. " * 200, encoding="utf-8")
    options = ("--calibration", str(text), "--group-size", "32", "--samples", "4", "--length", "32")
    status, said = run(capsys, "quantize", str(source), str(tmp_path / "a"), *options)
    assert status == 0 and "Perplexity" in said and str(tmp_path / "a") in said
    options = ("--calib-dataset", str(text), "--calib-samples", "4", "--calib-seqlen", "32")
    status, said = run(capsys, "lite", "smooth_quant", str(source), "--work-dir", str(tmp_path / "s"), *options)
    stored = json.loads((tmp_path / "s" / "config.json").read_text())["quantization_config"]
    assert status == 0 and stored["format"] == "int-quantized"
    status, said = run(capsys, "lite", "calibrate", str(source), "--work-dir", "x")
    assert status == 1 and "as they quantise" in said
    options = (*options, "--w-group-size", "32")
    status, said = run(capsys, "lite", "auto_gptq", str(source), "--work-dir", str(tmp_path / "b"), *options)
    assert status == 0 and (tmp_path / "b" / "tokenizer.model").is_file()
    config = json.loads((tmp_path / "b" / "config.json").read_text())
    assert config["quantization_config"]["sym"] is True and "auto_map" in config
    status, said = run(capsys, "lite", "auto_awq", str(source), "--calib-dataset", "wikitext2")
    assert (status == 1 and "a file of your own" in said) or "file of your own" in said
    status, said = run(capsys, "quantize", str(source), str(tmp_path / "c"), "--group-size", "32")
    assert status == 1 and "--calibration FILE" in said


def test_all_formats_are_covered() -> None:
    assert set(FORMATS) == {"awq", "gptq", "compressed-tensors", "chatglm"}
