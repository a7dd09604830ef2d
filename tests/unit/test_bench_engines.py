"""The files that drive engines: what they import, and that they count tokens and places right."""

from __future__ import annotations

import ast
import sys
from pathlib import Path
from types import ModuleType, SimpleNamespace
from typing import Any

import numpy as np
import pytest

import hanlin.llm
from hanlin.bench.child import open_engine
from hanlin.bench.peers import OURS, PEERS, Peer
from hanlin.types import Completion, Timings

SETTINGS = {"threads": 2, "sequences": 3, "length": 64, "options": {}}
PROMPTS = [[5, 6, 7], [8, 9, 10], [11, 12, 13]]
ALL = {"hanlin": OURS, **PEERS}


@pytest.mark.parametrize("name", ALL)
def test_an_engine_file_stands_alone(name: str) -> None:
    """It runs in a Python that may have nothing but its engine, and is imported where that is missing."""
    tree = ast.parse(ALL[name].file.read_text(encoding="utf-8"))
    imported: set[str] = set()
    for node in ast.walk(tree):
        if isinstance(node, ast.Import):
            imported.update(alias.name.partition(".")[0] for alias in node.names)
        elif isinstance(node, ast.ImportFrom):
            imported.add((node.module or "").partition(".")[0])
    module = open_engine(str(ALL[name].file))
    own = {module.REQUIRES.partition(".")[0], "torch", "numpy", *(["openvino"] if name == "openvino" else [])}
    assert imported - own <= sys.stdlib_module_names
    assert callable(module.load) and isinstance(module.ENVIRONMENT, dict)


def test_the_child_itself_needs_the_standard_library_only() -> None:
    tree = ast.parse((OURS.file.parents[1] / "child.py").read_text(encoding="utf-8"))
    names = {alias.name for node in ast.walk(tree) if isinstance(node, ast.Import) for alias in node.names}
    names |= {node.module or "" for node in ast.walk(tree) if isinstance(node, ast.ImportFrom)}
    assert {name.partition(".")[0] for name in names} <= {*sys.stdlib_module_names, "__future__"}


def load(peer: Peer, monkeypatch: pytest.MonkeyPatch, **modules: object) -> Any:
    for name, module in modules.items():
        monkeypatch.setitem(sys.modules, name, module)  # type: ignore[arg-type]
    return open_engine(str(peer.file)).load("model", SETTINGS)


class FakeLLM:
    """Three sequences of which the last had its first token at 2 s, and all ended at 4 s."""

    engine = SimpleNamespace(runner=SimpleNamespace(name="native"), used_bytes=lambda: {"weights": 7, "cache": 2})
    tokenizer = SimpleNamespace(special_ids=frozenset({2, 1}))
    config = SimpleNamespace(vocab_size=100)

    def generate(self, prompts: list[list[int]], **sampling: Any) -> list[Completion]:
        self.sampling = sampling
        times = [(0.5, 0.5, 3.0), (0.5, 1.0, 2.5), (1.0, 1.0, 2.0)]
        kinds = [Timings(queue=a, prompt=b, generation=c) for a, b, c in times[: len(prompts)]]
        return [Completion(text="", ids=(), finish_reason="length", timings=timings) for timings in kinds]


def test_ours(monkeypatch: pytest.MonkeyPatch) -> None:
    given: dict[str, Any] = {}
    fake = FakeLLM()
    monkeypatch.setattr(hanlin.llm, "load", lambda model, **options: (given.update(options), fake)[1])
    engine = load(OURS, monkeypatch)
    assert given == {"threads": 2, "max_batch_size": 3, "enable_prefix_caching": False, "speculation": "off"}
    assert engine.facts["vocabulary"] == 100 and engine.facts["special"] == [1, 2] and engine.facts["weights"] == 7
    first, _, tokens = engine.generate(PROMPTS, 60)
    assert fake.sampling == {"max_tokens": 61, "ignore_eos": True, "temperature": 0}
    assert first == 2.0
    # after 2 s: two thirds of the first one's, 2 of 2.5 parts of the second's, all of the third's
    assert tokens == 40 + 48 + 60
    first, total, tokens = engine.generate(PROMPTS[:1], 0)
    assert first == total and tokens == 0


class FakeLlama(ModuleType):
    """Remembers every batch, and answers each row with the number of rows so far."""

    __version__ = "9"

    def __init__(self) -> None:
        super().__init__("llama_cpp")
        self.batches: list[list[tuple[int, int, int, bool]]] = []
        self.opened: list[SimpleNamespace] = []
        self.cleared = 0
        for name in ("llama_backend_init", "llama_free", "llama_batch_free"):
            setattr(self, name, lambda *args: None)
        self.llama_model_default_params = SimpleNamespace
        self.llama_context_default_params = SimpleNamespace
        self.llama_model_load_from_file = lambda path, options: path
        self.llama_sampler_init_greedy = lambda: "greedy"
        self.llama_init_from_model = lambda model, options: (self.opened.append(options), "context")[1]
        self.llama_get_memory = lambda context: "memory"

    def llama_memory_clear(self, memory: str, data: bool) -> None:
        self.cleared += 1

    def llama_batch_init(self, size: int, embeddings: int, sequences: int) -> SimpleNamespace:
        names = ("token", "pos", "n_seq_id", "logits")
        return SimpleNamespace(seq_id=[[0] for _ in range(size)], n_tokens=0, **{name: [0] * size for name in names})

    def llama_decode(self, context: str, batch: SimpleNamespace) -> int:
        rows = range(batch.n_tokens)
        self.batches.append([(batch.token[i], batch.pos[i], batch.seq_id[i][0], bool(batch.logits[i])) for i in rows])
        assert all(batch.n_seq_id[i] == 1 for i in rows)
        return 0

    def llama_sampler_sample(self, sampler: str, context: str, row: int) -> int:
        _, place, sequence, wanted = self.batches[-1][row]
        assert wanted, "a row without logits was sampled"
        return 1000 + 100 * sequence + place


def test_llama_cpp_gets_every_token_at_its_place(monkeypatch: pytest.MonkeyPatch) -> None:
    fake = FakeLlama()
    engine = load(PEERS["llama-cpp"], monkeypatch, llama_cpp=fake)
    first, total, tokens = engine.generate(PROMPTS, 2)
    assert 0 < first < total and tokens == 6
    prompt, one, two = fake.batches
    assert prompt == [(t, p, s, p == 2) for s, ids in enumerate(PROMPTS) for p, t in enumerate(ids)]
    assert one == [(1000 + 100 * s + 2, 3, s, True) for s in range(3)]
    assert two == [(1000 + 100 * s + 3, 4, s, True) for s in range(3)]
    assert (fake.opened[0].n_seq_max, fake.opened[0].n_ctx, fake.opened[0].n_threads) == (3, 768, 2)


def test_llama_cpp_forgets_between_runs_and_keeps_its_context(monkeypatch: pytest.MonkeyPatch) -> None:
    fake = FakeLlama()
    engine = load(PEERS["llama-cpp"], monkeypatch, llama_cpp=fake)
    for _ in range(3):
        engine.generate(PROMPTS, 2)
    engine.generate(PROMPTS[:1], 2)
    assert (fake.cleared, len(fake.opened)) == (4, 2)


def test_llama_cpp_errors_are_not_timed(monkeypatch: pytest.MonkeyPatch) -> None:
    fake = FakeLlama()
    engine = load(PEERS["llama-cpp"], monkeypatch, llama_cpp=fake)
    fake.llama_decode = lambda context, batch: 1  # type: ignore[method-assign]
    with pytest.raises(RuntimeError, match="llama_decode returned 1"):
        engine.generate(PROMPTS, 2)


class FakeRequest:
    """Has its first token after `delay` steps, and then one a step."""

    def __init__(self, name: Any, delay: int, tokens: int) -> None:
        self.name, self.delay, self.left, self.new, self.got = name, delay, tokens, 0, 0

    def step(self) -> None:
        if self.delay:
            self.delay -= 1
        elif self.left:
            self.left, self.new, self.got = self.left - 1, self.new + 1, self.got + 1

    def can_read(self) -> bool:
        return self.new > 0

    def read(self) -> dict[int, SimpleNamespace]:
        new, self.new = self.new, 0
        return {0: SimpleNamespace(generated_ids=[1] * new)}


class FakeScheduler:
    """Requests that begin one step after the other: the last has its first token when the first has its third."""

    def __init__(self) -> None:
        self.requests: list[FakeRequest] = []

    def add(self, name: Any, tokens: int) -> FakeRequest:
        self.requests.append(FakeRequest(name, sum(1 for r in self.requests if r.left), tokens))
        return self.requests[-1]

    def step(self) -> None:
        for request in self.requests:
            request.step()

    @property
    def busy(self) -> bool:
        return any(request.left for request in self.requests)


def test_openvino_counts_what_comes_after_the_last_first_token(monkeypatch: pytest.MonkeyPatch) -> None:
    scheduler = FakeScheduler()
    seen: list[Any] = []

    class Pipeline:
        def __init__(self, *given: Any) -> None:
            seen.extend(given)

        def add_request(self, number: int, ids: Any, config: Any) -> FakeRequest:
            assert ids.shape == (1, 3) and config.ignore_eos and not config.do_sample
            return scheduler.add(number, config.max_new_tokens)

        def step(self) -> None:
            scheduler.step()

        def has_non_finished_requests(self) -> bool:
            return scheduler.busy

    genai = SimpleNamespace(
        SchedulerConfig=SimpleNamespace,
        GenerationConfig=SimpleNamespace,
        ContinuousBatchingPipeline=Pipeline,
        __version__="9",
    )
    engine = load(PEERS["openvino"], monkeypatch, openvino_genai=genai, openvino=SimpleNamespace(Tensor=np.asarray))
    assert seen[1].enable_prefix_caching is False and seen[3]["INFERENCE_NUM_THREADS"] == 2
    first, total, tokens = engine.generate(PROMPTS, 9)
    assert 0 < first < total
    assert tokens == 3 * 10 - (3 + 2 + 1)


def test_vllm_counts_what_comes_after_the_last_first_token(monkeypatch: pytest.MonkeyPatch) -> None:
    scheduler = FakeScheduler()
    given: dict[str, Any] = {}

    class Core:
        def add_request(self, name: str, prompt: dict[str, list[int]], sampling: SimpleNamespace) -> None:
            assert prompt["prompt_token_ids"] in PROMPTS and sampling.ignore_eos
            scheduler.add(name, sampling.max_tokens)

        def has_unfinished_requests(self) -> bool:
            return scheduler.busy

        def step(self) -> list[SimpleNamespace]:
            scheduler.step()
            return [
                SimpleNamespace(request_id=r.name, outputs=[SimpleNamespace(token_ids=[1] * r.got)])
                for r in scheduler.requests
                if r.got
            ]

    def make(model: str, **options: Any) -> SimpleNamespace:
        given.update(options)
        return SimpleNamespace(llm_engine=Core())

    threads: list[int] = []
    vllm = SimpleNamespace(LLM=make, SamplingParams=SimpleNamespace, __version__="9")
    torch = SimpleNamespace(set_num_threads=threads.append)
    engine = load(PEERS["vllm"], monkeypatch, vllm=vllm, torch=torch)
    assert (given["enable_prefix_caching"], given["max_num_seqs"], given["max_model_len"]) == (False, 3, 64)
    assert threads == [2]
    _, _, tokens = engine.generate(PROMPTS, 9)
    assert tokens == 3 * 10 - (3 + 2 + 1)


@pytest.mark.parametrize("name", ["past_key_values", "cache"])
def test_transformers_runs_a_prompt_and_then_one_token_at_a_time(monkeypatch: pytest.MonkeyPatch, name: str) -> None:
    """Its argument for the cache is `cache` since 5.24."""
    import torch

    shapes: list[tuple[int, ...]] = []
    places: list[dict[str, Any]] = []

    class Model:
        config = None
        forward: Any

        def eval(self) -> Model:
            return self

        def __call__(self, ids: torch.Tensor, **options: Any) -> SimpleNamespace:
            shapes.append(tuple(ids.shape))
            assert options["logits_to_keep"] == 1 and options[name] == "cache"
            return SimpleNamespace(logits=torch.zeros(len(ids), 1, 50))

    def make(path: Path, **options: Any) -> Model:
        places.append(options)
        model = Model()
        model.forward = (lambda cache: None) if name == "cache" else (lambda past_key_values: None)
        return model

    before = torch.get_num_threads()
    transformers = SimpleNamespace(
        AutoModelForCausalLM=SimpleNamespace(from_pretrained=make),
        DynamicCache=lambda config: "cache",
        __version__="9",
    )
    try:
        engine = load(PEERS["transformers"], monkeypatch, transformers=transformers)
    finally:
        torch.set_num_threads(before)
    first, total, tokens = engine.generate(PROMPTS, 2)
    assert shapes == [(3, 3), (3, 1), (3, 1)]
    assert 0 < first < total and tokens == 6
    assert places == [{"dtype": torch.bfloat16}]
