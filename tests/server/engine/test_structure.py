"""Structured output: a random byte-level model cannot help but keep to what was asked."""

import json
import random
import re
import time
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
import torch

from server.config import EngineLimits, ModelConfig
from server.engine.engine import Completion, Engine
from server.engine.request import AdapterUse, FinishReason, Request, Sampling, Stopping, Structure
from server.engine.sampler import SamplerState, sample
from server.engine.structure import _LIMITS, MAX_REPEAT, Structures
from server.errors import StructureFailed, StructureInvalid

_ids = iter(range(10**9))
EOS = 257


@pytest.fixture(scope="module")
def engine(tiny_base: Path, tmp_path_factory: pytest.TempPathFactory, make_adapter: Any, directory_fetch: Any) -> Any:
    adapter = make_adapter(tiny_base, tmp_path_factory.mktemp("adapters") / "a", seed=1)
    engine = Engine.build(
        ModelConfig(base=str(tiny_base), quantization="none", dtype="float32", threads=1),
        EngineLimits(adapter_memory_bytes=4 << 20, kv_memory_bytes=8 << 20, max_sequences=16),
        directory_fetch({"a": adapter}),
    )
    yield engine
    engine.close()
    engine.check_integrity()


@pytest.fixture
def structures(engine: Engine) -> Structures:
    return engine.structures


def request(
    structure: Structure | None, *, new: int = 300, seed: int = 0, temperature: float = 1.0, **more: Any
) -> Request:
    adapters = (AdapterUse("a", "t/a@1"),) if more.pop("adapter", False) else ()
    logprobs = more.pop("logprobs", None)
    prompt = more.pop("prompt", (1, 2, 3))
    return Request(
        id=str(next(_ids)),
        prompt=prompt,
        stopping=Stopping(max_new_tokens=new, **more),
        sampling=Sampling(temperature=temperature, seed=seed),
        adapters=adapters,
        logprobs=logprobs,
        structure=structure,
    )


def schema_of(value: Any) -> Structure:
    return Structure("json_schema", json.dumps(value))


def random_schema(rng: random.Random, depth: int = 0) -> dict[str, Any]:
    kinds = ["integer", "string", "boolean", "null", "enum", "pattern"] + ["object", "array", "anyOf"] * (depth < 2)
    match rng.choice(kinds):
        case "integer":
            low = rng.randrange(-200, 200)
            return {"type": "integer", "minimum": low, "maximum": low + rng.randrange(50)}
        case "string":
            return {"type": "string", "minLength": rng.randrange(3), "maxLength": 3 + rng.randrange(4)}
        case "enum":
            return {"enum": rng.sample(["red", "green", 1, 2.5, None, True, "日本"], 3)}
        case "pattern":
            return {"type": "string", "pattern": rng.choice(["^[a-z]{2,5}$", "^(x|yy)+z{1,3}$", "^[A-Z][0-9]{3}$"])}
        case "object":
            names = rng.sample(["a", "b", "long name", "ü"], rng.randrange(1, 4))
            return {
                "type": "object",
                "properties": {name: random_schema(rng, depth + 1) for name in names},
                "required": names[: rng.randrange(len(names) + 1)],
                "additionalProperties": False,
            }
        case "array":
            return {"type": "array", "items": random_schema(rng, depth + 1), "maxItems": rng.randrange(1, 4)}
        case "anyOf":
            return {"anyOf": [random_schema(rng, depth + 1), random_schema(rng, depth + 1)]}
        case plain:
            return {"type": plain}


def check_whole(answer: Completion) -> None:
    assert answer.error is None
    assert answer.finish_reason is FinishReason.STOP, (answer.text, answer.finish_reason)


def test_random_schemas_give_valid_json(engine: Engine) -> None:
    """Random small schemas, drawn and greedy, base and adapter, all in one batch; jsonschema is the judge.

    A drawn (x|yy)+ may run past any length: what LENGTH cut off is not judged, and says so.
    """
    import jsonschema

    rng = random.Random()
    schemas = [random_schema(rng) for _ in range(40)]
    asked = [
        request(schema_of(schema), seed=i, temperature=rng.choice([0, 0.7, 2.0]), adapter=i % 2 == 0)
        for i, schema in enumerate(schemas)
    ]
    answers = engine.generate(asked)
    whole = 0
    for schema, answer in zip(schemas, answers, strict=True):
        assert answer.error is None, schema
        if answer.finish_reason is FinishReason.STOP:
            jsonschema.validate(json.loads(answer.text), schema)
            whole += 1
    assert whole >= 35


def test_regexes_are_matched_from_end_to_end(engine: Engine) -> None:
    rng = random.Random()
    patterns = [
        r"[a-f]{3,8}",
        r"(yes|no|maybe)!{0,3}",
        r"[0-9]{4}-(0[1-9]|1[0-2])-[0-3][0-9]",
        r"[^\x00-\x7f]{2}",
        r"(é|日本){1,4}",
        r"arn:aws:s3:::[a-z]{1,12}(/\*)?",
        r"^anchored$",
        r"a.b\{\}",
    ]
    asked = [
        request(Structure("regex", pattern), seed=rng.getrandbits(60), temperature=temperature)
        for pattern in patterns
        for temperature in (0.0, 1.5)
    ]
    for one, answer in zip(asked, engine.generate(asked), strict=True):
        check_whole(answer)
        assert one.structure is not None
        assert re.fullmatch(one.structure.text, answer.text), (one.structure.text, answer.text)


def test_choices_come_out_whole(engine: Engine) -> None:
    choices = ("yes", "no", "yes, but (50%) [a|b]", "né", "a.b", "line\nbreak", "\\d-~#&")
    answers = engine.generate([request(Structure("choice", choices=choices), seed=i) for i in range(40)])
    for answer in answers:
        check_whole(answer)
    assert {answer.text for answer in answers} <= set(choices)
    assert len({answer.text for answer in answers}) > 1


def test_text_that_spells_a_special_token_is_written_as_text(engine: Engine) -> None:
    """The end-of-sequence token and another one, forced and chosen between; the real tokenizer's are tried below."""
    asked = [
        request(Structure("choice", choices=("a </s> b", "a </s> c"))),
        request(Structure("regex", "end: <\\|user\\|>!")),
        request(schema_of({"const": "</s>"})),
        request(Structure("choice", choices=("</s>",))),
    ]
    answers = engine.generate(asked)
    for answer in answers:
        check_whole(answer)
    assert answers[0].text in ("a </s> b", "a </s> c")
    assert [answer.text for answer in answers[1:]] == ["end: <|user|>!", '"</s>"', "</s>"]


def test_a_grammar_balances_its_brackets(engine: Engine) -> None:
    grammar = 'start: pair\npair: "(" inner? ")" | "[" inner "]"\ninner: pair | /[0-9]{1,2}/'
    answers = engine.generate([request(Structure("grammar", grammar), seed=i, new=400) for i in range(12)])
    for answer in answers:
        check_whole(answer)
        stack: list[str] = []
        for char in answer.text:
            if char in "([":
                stack.append(")" if char == "(" else "]")
            elif char in ")]":
                assert stack.pop() == char
        assert not stack


def test_the_same_seed_writes_the_same_in_any_company(engine: Engine) -> None:
    rng = random.Random()
    pattern = Structure("regex", "[a-z ]{10,30}")
    seeds = [rng.getrandbits(60) for _ in range(6)]
    alone = [engine.generate([request(pattern, seed=seed)])[0].token_ids for seed in seeds]
    assert all(len(tokens) >= 10 for tokens in alone)
    crowd = [request(pattern, seed=seed) for seed in seeds] + [request(None, new=20, seed=i) for i in range(4)]
    rng.shuffle(crowd)
    by_seed = dict(zip([one.sampling.seed for one in crowd], engine.generate(crowd), strict=True))
    assert [by_seed[seed].token_ids for seed in seeds] == alone


def test_neighbours_without_a_structure_are_untouched(engine: Engine) -> None:
    free = [request(None, new=20, ignore_eos=True, seed=i) for i in range(4)]
    alone = [answer.token_ids for answer in engine.generate(free)]
    again = [request(None, new=20, ignore_eos=True, seed=i) for i in range(4)]
    mixed = engine.generate([request(Structure("regex", "x{5,20}")), *again])
    assert [answer.token_ids for answer in mixed[1:]] == alone


def test_a_cut_off_answer_says_length(engine: Engine) -> None:
    [cut, exact] = engine.generate([request(Structure("regex", "[ab]{10}"), new=n) for n in (9, 10)])
    assert (cut.finish_reason, len(cut.text)) == (FinishReason.LENGTH, 9)
    # Whole at the very last token: nothing was cut off.
    assert (exact.finish_reason, len(exact.text)) == (FinishReason.STOP, 10)


def test_stop_strings_cut_and_say_so(engine: Engine) -> None:
    [answer] = engine.generate([request(Structure("regex", "abc-def"), stop_strings=("-",))])
    assert (answer.text, answer.finish_reason) == ("abc", FinishReason.STOP_STRING)


def test_the_end_comes_only_where_the_structure_may_end(engine: Engine) -> None:
    """[ab]{0,9}: the end is allowed throughout; below min_new_tokens and with ignore_eos it must not come."""
    optional = Structure("regex", "[ab]{0,9}")
    for seed in range(8):
        [low, never] = engine.generate(
            [request(optional, seed=seed, min_new_tokens=4), request(optional, seed=seed, ignore_eos=True)]
        )
        check_whole(low)
        assert len(low.text) >= 4
        assert (len(never.text), never.finish_reason, EOS in never.token_ids) == (9, FinishReason.STOP, False)


def test_a_whole_answer_ends_below_min_new_tokens(engine: Engine) -> None:
    [answer] = engine.generate([request(Structure("regex", "abc"), min_new_tokens=50)])
    assert (answer.text, answer.finish_reason) == ("abc", FinishReason.STOP)
    assert len(answer.token_ids) == 3  # no step is spent on an end-of-sequence token


def test_logprobs_are_of_what_is_possible(engine: Engine) -> None:
    [answer] = engine.generate([request(Structure("regex", "(ab|ac)d"), logprobs=5)])
    places = [place for delta in answer.deltas for place in delta.logprobs]
    assert [place.logprob for place in places] == pytest.approx([0, places[1].logprob, 0], abs=1e-6)
    assert [len(place.top) for place in places] == [1, 2, 1]
    assert sum(2.718281828459045**logprob for _, logprob in places[1].top) == pytest.approx(1, abs=1e-5)


def test_the_mask_is_what_the_reference_says(structures: Structures) -> None:
    """A plain reference: after a prefix, a byte may follow iff some text of the (finite) language goes on so."""
    language = ["cat", "car", "cart", "dog", "do"]
    state = structures.begin(Structure("choice", choices=tuple(language)), may_end=True)
    prefix = ""
    alphabet = json.loads(structures._hf.backend_tokenizer.to_str())["model"]["vocab"]
    for char in "cart":
        logits = torch.zeros(300)
        assert state.restrict(logits) is None
        allowed = {i for i, value in enumerate(logits.tolist()) if value == 0}
        expected = {alphabet[text[len(prefix)]] for text in language if text.startswith(prefix) and text != prefix}
        assert allowed == expected | ({EOS} if prefix in language else set())
        state.accept(alphabet[char])
        prefix += char
    assert state.complete


def test_forbidding_all_that_is_allowed_ends_that_row_alone(structures: Structures) -> None:
    x = structures._hf.convert_tokens_to_ids("x")
    structure = structures.begin(Structure("regex", "x{3}"), may_end=True)
    stuck = SamplerState.begin(Sampling(), None, (), frozenset({x}), 2, structure)
    fine = SamplerState.begin(Sampling(), None, (), frozenset(), 0, None)
    choices = sample(torch.randn(2, 300), [stuck, fine])
    assert isinstance(choices[0].error, StructureFailed)
    assert choices[1].token_id is not None


@pytest.mark.parametrize(
    "structure",
    [
        Structure("regex", "(a"),
        Structure("regex", r"(a)\1"),
        Structure("regex", "(?=a)b"),
        Structure("regex", "(" * 20_000 + "a" + ")" * 20_000),
        Structure("regex", f"x{{{MAX_REPEAT + 1}}}"),
        Structure("regex", "x{" + "9" * 9_000 + "}"),
        Structure("regex", "x{1,100000}"),
        Structure("regex", r"[^\s\S]"),
        Structure("regex", "()"),
        Structure("json_schema", "{"),
        Structure("json_schema", '{"type": "integer", "type": "string"}'),
        Structure("json_schema", '{"a": ' * 5_000 + "1" + "}" * 5_000),
        Structure("json_schema", '{"type": "strin"}'),
        Structure("json_schema", '{"type": "array", "uniqueItems": true}'),
        Structure("json_schema", '{"x-guidance": {"lenient": true}, "type": "array", "uniqueItems": true}'),
        Structure("json_schema", '{"$ref": "file:///etc/passwd"}'),
        Structure("json_schema", '{"$ref": "http://127.0.0.1/schema"}'),
        Structure("json_schema", '{"$ref": "#"}'),
        Structure("json_schema", '{"type": "string", "pattern": "x{100000}"}'),
        Structure("json_schema", '{"type": "integer", "minimum": 3, "maximum": 2}'),
        Structure("grammar", "start: start"),
        Structure("grammar", "%%%"),
        Structure("grammar", 'begin: "a"'),
        Structure("choice"),
        Structure("choice", choices=("a", "")),
    ],
    ids=lambda structure: f"{structure.kind}-{structure.text[:20]}",
)
def test_what_cannot_be_kept_is_refused_quickly(structures: Structures, structure: Structure) -> None:
    started = time.process_time()  # a neighbour on the cores does not count
    with pytest.raises(StructureInvalid) as refused:
        structures.compile(structure)
    assert time.process_time() - started < 2
    assert str(refused.value).startswith(structure.kind)
    assert len(str(refused.value)) < 500


@pytest.mark.parametrize(
    ("structure", "said"),
    [
        (Structure("regex", "(a"), "regex: invalid regex: unclosed group"),
        (Structure("regex", r"[^\s\S]"), "regex: no text matches it"),
        (schema_of({"$ref": "#"}), "json_schema: no text matches it"),
        (schema_of({"type": "string", "pattern": "(a"}), "json_schema: invalid regex: unclosed group"),
        (schema_of({"const": "a", "enum": ["b"]}), "json_schema: Unsatisfiable schema: Regex is empty"),
        (Structure("grammar", "start: foo"), 'grammar: at 1(8): unknown name: "foo"'),
        (Structure("grammar", "start: <|user|>"), 'grammar: at 1(8): unknown special token: "<|user|>"'),
        (Structure("grammar", "%%%"), "grammar: 1(2): lexer error"),
    ],
    ids=lambda value: value if isinstance(value, str) else "",
)
def test_refusals_are_in_words_for_callers(structures: Structures, structure: Structure, said: str) -> None:
    with pytest.raises(StructureInvalid) as refused:
        structures.compile(structure)
    assert str(refused.value) == said


def test_so_are_failures_midway(structures: Structures, monkeypatch: pytest.MonkeyPatch) -> None:
    state = structures.begin(Structure("regex", "ab"), may_end=True)
    state.accept(299)
    assert state.failed == "the structure cannot be followed further"
    monkeypatch.setitem(_LIMITS, "max_lexer_states", 60)
    state = structures.begin(Structure("regex", "([ab]*a[ab]{40})"), may_end=True)
    alphabet = json.loads(structures._hf.backend_tokenizer.to_str())["model"]["vocab"]
    for char in "abaababb" * 20:
        if state.failed is None:
            state.accept(alphabet[char])
    assert state.failed == "it is too complex"


@pytest.mark.parametrize(
    "structure",
    [
        *(
            Structure("regex", pattern)
            for pattern in (
                "(a+)+b",
                "(x+x+)+y",
                "([ab]*a[ab]{300})",
                "((a{1,100}){1,100}){1,100}",
                "(.*a.*){20}",
                "x{4096}",
            )
        ),
        Structure("grammar", 'start: a{1000}\na: b{1000}\nb: c{1000}\nc: "x"'),
        Structure("grammar", 'start: s "y"\ns: s s s | s s | "a" | ""'),
    ],
    ids=lambda structure: structure.text[:20],
)
def test_catastrophic_structures_cost_little(engine: Engine, structure: Structure) -> None:
    """The engine's other requests go on, and each step stays short: 40 of them take less than four seconds."""
    started = time.process_time()  # a neighbour on the cores does not count
    hostile, other = engine.generate([request(structure, new=40), request(None, new=40)])
    assert time.process_time() - started < 4
    assert hostile.error is None or isinstance(hostile.error, StructureInvalid | StructureFailed)
    assert other.error is None


@pytest.fixture(scope="module")
def real_tokenizer(smollm2: Path) -> Any:
    from transformers import AutoTokenizer

    return AutoTokenizer.from_pretrained(smollm2)


@pytest.fixture(scope="module")
def real_structures(real_tokenizer: Any) -> Structures:
    return Structures(real_tokenizer, len(real_tokenizer), {real_tokenizer.eos_token_id})


def walk(structures: Structures, structure: Structure, rng: random.Random, tokens: int = 40) -> list[list[int]]:
    """What was taken and, after it, what was allowed at every step of a random walk."""
    state = structures.begin(structure, may_end=False)
    taken: list[int] = []
    allowed = [taken]
    while not state.complete and len(taken) < tokens:
        mask = state.allowed()
        assert mask is not None, state.failed
        allowed.append(mask.nonzero().flatten().tolist())
        taken.append(rng.choice(allowed[-1]))
        state.accept(taken[-1])
    return allowed


@pytest.mark.real
@pytest.mark.parametrize(
    ("structure", "texts"),
    [
        (Structure("choice", choices=("<|im_end|>",)), {"<|im_end|>"}),
        (Structure("choice", choices=("<reponame>", "<|endoftext|>")), {"<reponame>", "<|endoftext|>"}),
        (
            Structure("choice", choices=("a <|im_end|> marker", "b <|im_end|> marker")),
            {"a <|im_end|> marker", "b <|im_end|> marker"},
        ),
        (Structure("regex", r"end: <\|im_end\|>!"), {"end: <|im_end|>!"}),
        (schema_of({"enum": ["<|endoftext|>"]}), {'"<|endoftext|>"'}),
        (
            schema_of(
                {
                    "type": "object",
                    "properties": {"token": {"const": "<|im_end|>"}},
                    "required": ["token"],
                    "additionalProperties": False,
                }
            ),
            {'{"token": "<|im_end|>"}'},
        ),
        (Structure("grammar", 'start: "<|im_start|>" | "<file_sep>"'), {"<|im_start|>", "<file_sep>"}),
    ],
    ids=lambda value: value.kind if isinstance(value, Structure) else "",
)
def test_real_special_tokens_spelled_are_text(
    real_structures: Structures, real_tokenizer: Any, structure: Structure, texts: set[str]
) -> None:
    rng = random.Random()
    for _ in range(6):
        taken, *_ = walk(real_structures, structure, rng)
        assert real_tokenizer.decode(taken, skip_special_tokens=True) in texts


@pytest.mark.real
def test_ordinary_structures_allow_what_the_plain_tokenizer_allows(
    real_structures: Structures, real_tokenizer: Any
) -> None:
    from llguidance.hf import from_tokenizer

    plain = Structures(real_tokenizer, len(real_tokenizer), {real_tokenizer.eos_token_id})
    plain._tokenizer = from_tokenizer(real_tokenizer, n_vocab=len(real_tokenizer))
    ordinary = [
        schema_of(IAM_POLICY),
        Structure("regex", r"[0-9]{4}-(0[1-9]|1[0-2])|<[a-z |]{1,20}>|[^a]{1,9}"),
        Structure("choice", choices=("positive", "né", "日本")),
    ]
    for seed in range(4):
        for structure in ordinary:
            ours, theirs = (walk(one, structure, random.Random(seed)) for one in (real_structures, plain))
            assert ours == theirs


@pytest.fixture(scope="module")
def real_engine(smollm2: Path) -> Iterator[Engine]:
    engine = Engine.build(
        ModelConfig(base="smollm2-135m", quantization="none", dtype="bfloat16", threads=1),
        EngineLimits(kv_memory_bytes=256 << 20, adapter_memory_bytes=16 << 20),
        fetch=lambda digest: pytest.fail("no adapter was asked for"),
    )
    yield engine
    engine.close()


IAM_POLICY = {
    "type": "object",
    "properties": {
        "Version": {"const": "2012-10-17"},
        "Statement": {
            "type": "array",
            "minItems": 1,
            "maxItems": 1,
            "items": {
                "type": "object",
                "properties": {
                    "Effect": {"enum": ["Allow", "Deny"]},
                    "Action": {
                        "type": "array",
                        "minItems": 1,
                        "maxItems": 2,
                        "items": {"type": "string", "pattern": "^[a-z0-9]{2,12}:[A-Z][A-Za-z]{2,16}$"},
                    },
                    "Resource": {"type": "string", "pattern": "^arn:aws:[a-z0-9]{2,12}:::[a-z0-9/*-]{1,16}$"},
                },
                "required": ["Effect", "Action", "Resource"],
                "additionalProperties": False,
            },
        },
    },
    "required": ["Version", "Statement"],
    "additionalProperties": False,
}


@pytest.mark.real
@pytest.mark.timeout(120)
def test_iam_policies_are_valid_json_every_time(real_engine: Engine) -> None:
    import jsonschema

    services = ["s3", "ec2", "sqs", "sns", "iam", "kms", "rds", "lambda", "dynamodb", "logs"]
    asked = []
    for i, service in enumerate(services * 2):
        text = f"Write an IAM policy that {'denies' if i % 3 else 'allows'} reading from {service}."
        prompt = tuple(real_engine.text.render_chat([{"role": "user", "content": text}]))
        asked.append(request(schema_of(IAM_POLICY), prompt=prompt, seed=i, temperature=0.8 if i % 2 else 0.0, new=260))
    answers = real_engine.generate(asked)
    for answer in answers:
        check_whole(answer)
        jsonschema.validate(json.loads(answer.text), IAM_POLICY)
    assert len({answer.text for answer in answers}) > 10
