"""`expert_iteration.ifeval`: each kind of instruction, what is judged for what, odd texts, and runs on real prompts."""

import json
import logging
import math
import random
import subprocess
import sys
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import nltk
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from local_runs import THREE_BATCHES, LocalPool, run_algorithm
from nltk.tokenize.punkt import PunktTokenizer

from expert_iteration import ifeval, ifeval_checkers, rewards
from expert_iteration.errors import UserError
from expert_iteration.ifeval_instructions import ARGUMENTS, LANGUAGES, read_instructions
from expert_iteration.problems import Problem

ROOT = Path(__file__).parents[1]
IFEVAL = ROOT / "../shared/data/ifeval/input_data.jsonl"
has_real_prompts = pytest.mark.skipif(not IFEVAL.is_file(), reason="IFEval's prompts are not here")

GERMAN = "Der schnelle braune Fuchs springt über den faulen Hund und läuft danach wieder nach Hause."
ENGLISH = "The quick brown fox jumps over the lazy dog and then it runs all the way back to its home."


@pytest.fixture(autouse=True)
def no_remembered_judgements():
    ifeval._follow.cache_clear()


def follow(kind: str, arguments: dict, response: str) -> tuple[bool, bool]:
    [strict], [loose] = rewards.ifeval_follow("Write.", [kind], [arguments], response)
    return strict, loose


def problem_of(*instructions: tuple[str, dict]) -> Problem:
    kinds, kwargs = zip(*instructions, strict=True)
    return Problem("Write.", "", {"key": 1, "instruction_id_list": list(kinds), "kwargs": list(kwargs)})


def answered(text: str) -> str:
    return f"<think>so</think><answer>{text}</answer>"


# Each kind: arguments, a response that follows, one that does not.
KINDS = {
    "keywords:existence": ({"keywords": ["sun", "C++"]}, "Sunny days of c++.", "Sunny days of c."),
    "keywords:frequency": (
        {"keyword": "sun", "frequency": 2, "relation": "at least"},
        "Sun and sunshine.",
        "One sun.",
    ),
    "keywords:forbidden_words": ({"forbidden_words": ["rain", "C++"]}, "Trains in C.", "Not C++ again."),
    "keywords:letter_frequency": (
        {"letter": "#", "let_frequency": 2, "let_relation": "at least"},
        "#one #two",
        "#one, and many letters of the alphabet",
    ),
    "language:response_language": ({"language": "de"}, GERMAN, ENGLISH),
    "length_constraints:number_sentences": (
        {"num_sentences": 3, "relation": "less than"},
        "I met Dr. No. He said 3.5 times.",
        "I met him. He left. I stayed.",
    ),
    "length_constraints:number_paragraphs": ({"num_paragraphs": 2}, "One\n***\ntwo", "One\n\ntwo"),
    "length_constraints:number_words": ({"num_words": 3, "relation": "at least"}, "one two three", "one two"),
    "length_constraints:nth_paragraph_first_word": (
        {"num_paragraphs": 2, "nth_paragraph": 2, "first_word": "Then"},
        "First.\n\nThen, more.",
        "First.\n\nAnd then.",
    ),
    "detectable_content:number_placeholders": ({"num_placeholders": 2}, "[a] and [b]", "[a] and [b\n]"),
    "detectable_content:postscript": ({"postscript_marker": "P.P.S"}, "Bye.\nP. P.S. More", "Bye.\nP.S. More"),
    "detectable_format:number_bullet_lists": ({"num_bullets": 2}, "\n * one\n- two", "* one\n** two"),
    "detectable_format:constrained_response": ({}, "My answer is maybe.", "Maybe."),
    "detectable_format:number_highlighted_sections": ({"num_highlights": 2}, "*a* and *b*", "*a* and **"),
    "detectable_format:multiple_sections": (
        {"section_spliter": "SECTION", "num_sections": 2},
        "SECTION 1\na\nSECTION 2\nb",
        "Section 1\na\nSection 2\nb",
    ),
    "detectable_format:json_format": ({}, '```json\n{"a": [1]}\n```', "{'a': 1}"),
    "detectable_format:title": ({}, "Here: <<A title>>", "Here: << >>"),
    "combination:two_responses": ({}, "one******two", "one******one"),
    "combination:repeat_prompt": ({"prompt_to_repeat": "Say it."}, "say it. It.", "It. Say it."),
    "startend:end_checker": ({"end_phrase": "The end."}, 'So it is the end."', "The end. Or not."),
    "startend:quotation": ({}, '"All of it."', '"All" of it.'),
    "change_case:capital_word_frequency": (
        {"capital_frequency": 2, "capital_relation": "at least"},
        "LOOK here. STOP. Now.",
        "LOOK here. Stop. Now.",
    ),
    "change_case:english_capital": ({}, "IT IS A SUNNY DAY IN THE CITY.", ENGLISH),
    "change_case:english_lowercase": ({}, ENGLISH.lower(), GERMAN.lower()),
    "punctuation:no_comma": ({}, "One and two.", "One, two."),
}
MORE = [
    ("change_case:english_lowercase", {}, ENGLISH, False),
    (
        "keywords:letter_frequency",
        {"letter": "e", "let_frequency": 2, "let_relation": "less than"},
        "Every tree",
        False,
    ),
    ("length_constraints:number_words", {"num_words": 3.0, "relation": "less than"}, "one two", True),
    ("length_constraints:number_words", {"num_words": 0, "relation": "at least"}, "one", True),
    ("detectable_content:postscript", {"postscript_marker": "P.S."}, "Bye.\np.s. More", True),
    ("detectable_content:postscript", {"postscript_marker": "PS+"}, "Bye.\nPSS", False),
    ("detectable_format:multiple_sections", {"section_spliter": "(Part)", "num_sections": 1}, "(Part) 1: a", True),
    # What has no language at all counts as followed, as in the benchmark.
    ("language:response_language", {"language": "de"}, "42!", True),
]


@pytest.mark.parametrize("kind", ARGUMENTS)
def test_each_kind_of_instruction(kind):
    arguments, good, bad = KINDS[kind]
    # The hub's rows have every argument that any kind takes.
    unified = {name: None for names in ARGUMENTS.values() for name in names} | arguments
    assert follow(kind, unified, good) == (True, True)
    assert follow(kind, unified, bad) == (False, False)
    assert follow(kind, arguments, " \n") == (False, False)


@pytest.mark.parametrize(("kind", "arguments", "response", "expected"), MORE)
def test_further_cases(kind, arguments, response, expected):
    assert follow(kind, arguments, response)[0] == expected


@pytest.mark.parametrize(
    ("kind", "arguments", "response"),
    [
        ("combination:repeat_prompt", {"prompt_to_repeat": "Say it."}, "Sure!\nSay it. It."),
        ("startend:end_checker", {"end_phrase": "The end."}, "The end.\nAnything else?"),
        ("detectable_format:json_format", {}, 'Sure:\n{"a": 1}\nThere.'),
        ("startend:quotation", {}, '**"All of it."**'),
        ("startend:quotation", {}, 'Sure:\n*"All"*\nThere.'),
    ],
)
def test_loosely_a_first_line_a_last_line_and_asterisks_do_not_count(kind, arguments, response):
    assert follow(kind, arguments, response) == (False, True)


def test_a_prompts_instructions_are_judged_one_by_one():
    kinds = ["punctuation:no_comma", "startend:quotation", "detectable_format:title"]
    assert rewards.ifeval_follow("Write.", kinds, [{}, {}, {}], "<<T>>\n*a*") == (
        [True, False, True],
        [True, False, True],
    )


@pytest.mark.parametrize(
    ("ids", "kwargs", "reason"),
    [
        ("punctuation:no_comma", [{}], "not a list of names"),
        (["punctuation:no_comma"], [], "one dictionary an instruction"),
        (["punctuation:no_colon"], [{}], "unknown instruction punctuation:no_colon"),
        (["punctuation:no_comma"], [{"num_words": 3}], "takes no arguments, and has num_words"),
        (["startend:end_checker"], [{"end_phrase": None}], "takes end_phrase, and has none"),
        (["startend:end_checker"], [{"end_phrase": " "}], "end_phrase=' ' is not a text"),
        (["keywords:existence"], [{"keywords": "sun"}], "keywords='sun' is not a list of words"),
        (["keywords:existence"], [{"keywords": []}], "takes keywords, and has none"),
        (["language:response_language"], [{"language": "xx"}], "language='xx' is not a language"),
        (["detectable_content:number_placeholders"], [{"num_placeholders": -1}], "num_placeholders=-1 is not a whole"),
        (["detectable_content:number_placeholders"], [{"num_placeholders": math.inf}], "is not a whole number"),
        (["length_constraints:number_words"], [{"num_words": 3, "relation": "more"}], "not less than or at least"),
        (
            ["length_constraints:nth_paragraph_first_word"],
            [{"num_paragraphs": 2, "nth_paragraph": 3, "first_word": "so"}],
            "nth_paragraph=3 of 2 paragraphs",
        ),
    ],
)
def test_what_cannot_be_judged_is_named(ids, kwargs, reason):
    with pytest.raises(ValueError, match=reason):
        read_instructions(ids, kwargs)


# What is judged for what

NO_COMMA = ("punctuation:no_comma", {})
THREE_SENTENCES = ("length_constraints:number_sentences", {"relation": "at least", "num_sentences": 3})
QUOTED = ("startend:quotation", {})


@pytest.mark.parametrize(
    ("problem", "response", "reward", "correct"),
    [
        (problem_of(NO_COMMA), answered("No comma here."), 1.15, True),
        (problem_of(NO_COMMA), "<answer>No comma here.</answer>", 1.1, True),
        (problem_of(NO_COMMA), answered("One, two."), 0.15, False),
        # Half of the instructions followed: 0.3 / 2 + 0.1 / 2 of the two shares, and the tags.
        (problem_of(NO_COMMA, THREE_SENTENCES), answered("One. Two."), 0.35, False),
        # Loosely alone: 0.2 + 0.1.
        (problem_of(QUOTED), answered('*"All"*'), 0.45, False),
        # The thought is no part of what is judged, and neither is a second answer, which costs its 0.1.
        (problem_of(NO_COMMA), "<think>One, two.</think><answer>One.</answer>", 1.15, True),
        (problem_of(NO_COMMA), answered("One.") + "<answer>One, two.</answer>", 1.05, True),
        (problem_of(NO_COMMA), answered(""), 0.15, False),
        # Without an answer the reward sees nothing; the pass sees everything.
        (problem_of(NO_COMMA), "No comma here.", 0.0, True),
        (problem_of(NO_COMMA), "<think>so</think>No comma here. <answer>Nor", 0.05, True),
        (problem_of(NO_COMMA), "One, two.", 0.0, False),
    ],
)
def test_reward_and_pass(problem, response, reward, correct):
    assert ifeval.ifeval_rewards([problem], [response]) == [reward]
    assert ifeval.ifeval_corrects([problem], [response]) == [correct]


def test_the_reward_is_torchrls():
    from tensordict import NonTensorData, TensorDict
    from torchrl.envs.llm.reward.ifeval import IfEvalScorer
    from torchrl.envs.llm.reward.ifeval._scorer import _process_results

    scorer = IfEvalScorer()
    problem = problem_of(NO_COMMA, QUOTED, ("detectable_format:title", {}))
    row = TensorDict({name: NonTensorData(value) for name, value in problem.metadata.items()})
    for text in ("", "a, b", '"a"', '*"a"*', '"<<a>>"', '"<<a>>, b"', '**"<<a>>"**', 'So:\n"<<a>>"'):
        score = _process_results(row, text, prompt=problem.question)
        expected = scorer.default_reward_aggregator(score, think_blocks=["so"], answer_blocks=[text])
        assert ifeval.ifeval_rewards([problem], [answered(text)]) == [pytest.approx(float(expected))]


def test_the_four_accuracies_are_those_of_the_benchmark():
    problems = [problem_of(NO_COMMA, QUOTED), problem_of(NO_COMMA), problem_of(NO_COMMA)]
    responses = [answered('*"a"*'), "a, b", answered("a")]
    assert ifeval.ifeval_figures(problems, responses) == {
        "prompt_level_strict_acc": pytest.approx(1 / 3),
        "inst_level_strict_acc": pytest.approx(2 / 4),
        "prompt_level_loose_acc": pytest.approx(2 / 3),
        "inst_level_loose_acc": pytest.approx(3 / 4),
    }


def test_a_response_is_judged_once_for_reward_pass_and_figures():
    problems, responses = [problem_of(NO_COMMA)] * 2, [answered("a"), answered("b")]
    for judge in (ifeval.ifeval_rewards, ifeval.ifeval_corrects, ifeval.ifeval_figures):
        judge(problems, responses)
    assert ifeval._follow.cache_info().misses == 2


# The checkers

# Texts in which much of the instructions' syntax happens by chance.
PIECES = [*"*-[],{}:1\n\n \t'.!aBp", "<<", ">>", "***", '"', "P.", "S.", "C D", "Section 1", "\n\n", "My answer is no."]
TEXTS = st.lists(st.sampled_from(PIECES), min_size=1, max_size=25).map("".join)
IN_THE_TEXTS = {
    "keywords:existence": {"keywords": ["a", "C D"]},
    "keywords:frequency": {"keyword": "a", "frequency": 2, "relation": "at least"},
    "keywords:forbidden_words": {"forbidden_words": ["a", "C D"]},
    "keywords:letter_frequency": {"letter": "p", "let_frequency": 2, "let_relation": "at least"},
    "length_constraints:nth_paragraph_first_word": {"num_paragraphs": 2, "nth_paragraph": 2, "first_word": "a"},
    "detectable_format:multiple_sections": {"section_spliter": "Section", "num_sections": 2},
    "combination:repeat_prompt": {"prompt_to_repeat": "A"},
    "startend:end_checker": {"end_phrase": "a."},
}
# Two need nltk's data in TorchRL, and langdetect draws at random there.
IN_TORCHRL = [k for k in ARGUMENTS if "sentences" not in k and "change_case" not in k and "language" not in k]


@settings(max_examples=300, deadline=None, derandomize=True)
@given(text=TEXTS)
def test_the_checkers_give_torchrls_verdicts(text):
    from torchrl.envs.llm.reward.ifeval._instructions_registry import INSTRUCTION_DICT

    for kind in IN_TORCHRL:
        arguments = IN_THE_TEXTS.get(kind, KINDS[kind][0])
        theirs = INSTRUCTION_DICT[kind](kind)
        theirs.build_description(**arguments)
        [instruction] = read_instructions([kind], [arguments])
        assert ifeval_checkers.check_of(instruction)(text) == theirs.check_following(text), kind


ODD_TEXTS = {
    "nothing": "",
    "emoji": "😀🎉",
    "zero byte": "\0",
    "line breaks": "\n" * 100_000 + "x",
    "white space": " \t\n" * 33_000 + "p",
    "opening brackets": "[" * 100_000,
    "opening titles": "<<x" * 33_000,
    "opening objects": '{"a":' * 20_000,
    "asterisks": "*" * 100_000,
    "stops": ". " * 20_000,
    "answers that begin": "<answer>" * 12_000,
}


@pytest.mark.timeout(60)  # seconds; the benchmark's checkers take minutes for these
@pytest.mark.parametrize("text", ODD_TEXTS.values(), ids=ODD_TEXTS)
def test_no_text_stops_a_run(text):
    problem = problem_of(*((kind, KINDS[kind][0]) for kind in ARGUMENTS))
    [reward] = ifeval.ifeval_rewards([problem], [f"<answer>{text}</answer>"])
    [is_right] = ifeval.ifeval_corrects([problem], [text])
    assert 0.1 <= reward < 1
    assert not is_right


@pytest.fixture
def sentence_data(tmp_path, monkeypatch):
    """nltk's data directory, empty; punkt_tab may be installed in it."""
    monkeypatch.setattr(nltk.data, "path", [str(tmp_path)])
    ifeval_checkers._sentence_tokenizer.cache_clear()
    yield tmp_path
    ifeval_checkers._sentence_tokenizer.cache_clear()


def install_punkt(folder: Path, abbreviation: str) -> None:
    folder = folder / "tokenizers/punkt_tab/english"
    folder.mkdir(parents=True)
    for name, text in {"abbrev_types.txt": abbreviation, "collocations.tab": "", "sent_starters.txt": ""}.items():
        (folder / name).write_text(text)
    (folder / "ortho_context.tab").write_text("")


def test_without_sentence_data_nltks_algorithm_has_a_list_of_abbreviations_and_says_so_once(sentence_data, caplog):
    with caplog.at_level(logging.WARNING):
        for text, expected in {
            "I met Dr. No. Who? Him!": True,
            "I met Dr. No. Who?": False,
            "He left at 5 p.m. on Jan. 3 for the U.S. coast.": False,
            "Wait... what?! Yes. No.": True,
        }.items():
            assert follow(*THREE_SENTENCES, text)[0] == expected
    assert sum("punkt_tab is not installed" in record.message for record in caplog.records) == 1


def test_installed_sentence_data_are_used(sentence_data, caplog):
    install_punkt(sentence_data, "zzz")
    # A word that stands in no list but this one's.
    assert follow(*THREE_SENTENCES, "One zzz. Two. Three.")[0] is False
    assert follow(*THREE_SENTENCES, "One yyy. Two. Three.")[0] is True
    assert isinstance(ifeval_checkers._sentence_tokenizer(), PunktTokenizer)
    assert not caplog.records
    # All other kinds need none of it, and count the same.
    assert all(follow(kind, arguments, good)[0] for kind, (arguments, good, _) in KINDS.items() if "sent" not in kind)


def test_language_codes_are_langdetects():
    assert set(ifeval_checkers._languages().get_lang_list()) == LANGUAGES


def test_the_random_state_is_neither_used_nor_changed():
    kinds = [(kind, arguments) for kind, (arguments, _, _) in KINDS.items()]
    judgements = set()
    for seed in range(3):
        random.seed(seed)
        state = random.getstate()
        ifeval._follow.cache_clear()
        # "Ja oui si" is a text that langdetect calls one language or another unless it is seeded.
        judgements.add(
            tuple(ifeval.ifeval_rewards([problem_of(*kinds)] * 2, [answered("Ja oui si"), answered(GERMAN)]))
        )
        assert random.getstate() == state
    assert len(judgements) == 1


# Texts of no language in particular, and what another process, on another day, took them for.
DETECTED = {"Ja oui si": "fr", "no": "tl", "a la carte": "es", "Hallo you": "es", "si si": "fi", "ha ha": "so"}


def test_processes_and_threads_tell_the_same_languages():
    ifeval_checkers._languages.cache_clear()
    instructions = [{"language": code} for code in DETECTED.values()]
    with ThreadPoolExecutor(2) as threads:
        told = threads.map(follow, ["language:response_language"] * len(DETECTED), instructions, DETECTED)
        assert list(told) == [(True, True)] * len(DETECTED)


def test_the_libraries_of_the_checkers_are_imported_when_something_is_judged_and_torch_is_none_of_them():
    code = (
        "import sys; from expert_iteration.rewards import ifeval_follow; from expert_iteration import ifeval; "
        "assert not {'nltk', 'langdetect'} & set(sys.modules); "
        "print(ifeval_follow('', ['punctuation:no_comma'], [{}], 'a')); assert 'torch' not in sys.modules"
    )
    done = subprocess.run([sys.executable, "-c", code], cwd=ROOT, check=True, capture_output=True, text=True)
    assert done.stdout == "([True], [True])\n"


def test_missing_library_is_refused_with_the_requirements_file(monkeypatch):
    monkeypatch.setattr(ifeval, "REQUIREMENTS", ("nltk", "no_such_library"))
    with pytest.raises(UserError, match=r"no_such_library.*requirements_ifeval\.txt"):
        ifeval.check_requirements()


# Real prompts


@has_real_prompts
def test_every_real_row_can_be_judged_and_has_the_kinds_that_there_are():
    rows = [json.loads(line) for line in IFEVAL.read_text().splitlines()]
    instructions = [one for row in rows for one in read_instructions(row["instruction_id_list"], row["kwargs"])]
    assert len(rows) == 540
    assert {one.kind for one in instructions} == set(ARGUMENTS)
    for one in set(instructions):
        ifeval_checkers.check_of(one)("Hello.")


@has_real_prompts
def test_a_run_on_real_prompts(make_cfg, load_script, warm_tiny_model, tmp_path):
    from expert_iteration.transformers_engine import TransformersEngine

    cfg = make_cfg(
        f"model.name={warm_tiny_model}",
        *THREE_BATCHES,
        "env.dataset=ifeval",
        f"env.dataset_path={IFEVAL}",
        "train.selection=topk",
        "inference_model.backend=transformers",
        "inference_model.max_tokens=24",
        "eval.num_prompts=4",
        "eval.num_samples=2",
        "eval.frequency=0",
        "logging.backend=none",
    )
    engine = TransformersEngine(str(warm_tiny_model), cfg.inference_model, batch_size=32)
    run = run_algorithm(load_script("expert-iteration-sync"), cfg, LocalPool(engine), tmp_path / "run")
    means = [line["collector/rewards/mean"] for line in run.lines if "collector/rewards/mean" in line]
    assert len(means) == 3
    assert all(0 <= mean <= 1.15 for mean in means)
    names = {f"{level}_level_{how}_acc" for level in ("prompt", "inst") for how in ("strict", "loose")}
    logged = [line for line in run.lines if "eval/pass@1" in line]
    assert len(logged) == 2
    for line, figures in zip(logged, (run.summary["eval"]["before"], run.summary["eval"]["after"]), strict=True):
        assert {name: line[f"eval/{name}"] for name in names} == {name: figures[name] for name in names}
        assert figures["pass@1"] == figures["prompt_level_strict_acc"] <= figures["prompt_level_loose_acc"]
