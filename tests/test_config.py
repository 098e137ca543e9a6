"""Configuration: what is refused and how, YAML there and back, fingerprints, the paper's defaults."""

from pathlib import Path

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from pipeline.common.errors import UsageError
from pipeline.config.params import MAX_CHARACTERS, dump, load_config, parse_yaml, resolve
from pipeline.config.schema import Config, Recipe, Student, result_fields
from pipeline.config.validation import fingerprint

CONFIGS = sorted((Path(__file__).parent.parent / "configs").glob("*.yaml"))

property_settings = settings(derandomize=True, deadline=None, max_examples=40)


def refusal(values, overrides=()) -> str:
    with pytest.raises(UsageError) as caught:
        resolve(values, overrides, "trial.yaml")
    return str(caught.value)


def nested(key: str, value):
    for part in reversed(key.split(".")):
        value = {part: value}
    return value


def read(config: Config, key: str):
    for part in key.split("."):
        config = getattr(config, part)
    return config


@pytest.mark.parametrize(
    ("key", "nearest"),
    [
        ("studnet", "student"),
        ("recipe.sise", "size"),
        ("student.epoch", "epochs"),
        ("finetune.form", "from"),
        ("teacher_logits.topk", "top_k"),
    ],
)
def test_unknown_key_is_refused_with_its_full_name_and_the_nearest_key(key, nearest):
    first_line, rest = refusal(nested(key, 1)).split("\n", 1)
    assert first_line == f"trial.yaml: {key}"
    assert f"did you mean {nearest}?" in rest


def test_unknown_key_of_a_variant_is_refused_with_the_variant_named():
    message = refusal({"variants": {"hard": {"epoch": 3}}})
    assert "variants.hard" in message and "epoch" in message and "did you mean epochs?" in message


@pytest.mark.parametrize(
    ("key", "value"),
    [
        ("student.epochs", "three"),
        ("student.epochs", 3.0),
        ("student.lr", "5e-4"),
        ("student", 5),
        ("student.compile", 1),
        ("recipe.seed", True),
        ("recipe.hflip", 1.5),
        ("teacher.weights", 7),
        ("teacher_logits.kind", "sparse"),
        ("students", "hard"),
        ("data.train", None),
    ],
)
def test_wrong_type_or_value_is_refused_with_key_and_finding(key, value):
    message = refusal(nested(key, value))
    assert message.startswith(f"trial.yaml: {key}\n") and repr(value) in message


def test_null_is_an_empty_text():
    assert resolve({"data": {"train": "a", "val_fraction": 0.1}}, ("data.val=",), "test").data.val == ""


@pytest.mark.parametrize("key", ["student.lr", "student.clip_grad"])
def test_infinity_is_refused(key):
    assert key in refusal(nested(key, float("inf")))


def test_a_mean_that_is_no_number_is_refused():
    assert "recipe.mean" in refusal({"recipe": {"mean": [float("nan"), 0.5, 0.5]}})


@pytest.mark.parametrize(
    ("values", "named"),
    [
        ({"teacher_logits": {"views": 301}}, ["teacher_logits.views", "recipe.block", "301", "30"]),
        ({"finetune": {"views": 31}}, ["finetune.views", "recipe.block", "31", "30"]),
        ({"recipe": {"block": 31}}, ["recipe", "block 31", "repeats 3"]),
        ({"student": {"batch_size": 1000}}, ["student.batch_size", "recipe.group_size", "1000", "64"]),
        ({"teacher": {"batch_size": 32}}, ["teacher.batch_size", "recipe.group_size", "32", "64"]),
        ({"finetune": {"batch_size": 100}}, ["finetune.batch_size", "recipe.group_size", "100", "64"]),
        ({"student": {"accumulation": 3}}, ["student.accumulation", "16", "3"]),
        ({"student": {"distillation": "soft"}}, ["teacher_logits.kind", "topk", "dense", "argmax", "hard"]),
        (
            {"variants": {"hard": {"distillation": "soft"}}},
            ["teacher_logits.kind", "topk", "dense", "argmax", "hard"],
        ),
        (
            {"variants": {"soft": {"distillation": "soft"}}, "students": [], "finetune": {"from": "soft"}},
            ["teacher_logits.kind", "argmax", "student soft"],
        ),
        ({"variants": {"hard": {"batch_size": 100}}}, ["variants.hard.batch_size", "recipe.group_size"]),
        ({"finetune": {"from": "soft"}}, ["finetune.from", "students", "hard", "soft"]),
        ({"students": ["hard", "hard"]}, ["students", "different"]),
        ({"students": ["plain"]}, ["plain", "variants"]),
        ({"student": {"reuse_view": 0}}, ["recipe.mix_prob", "reuse_view", "hard"]),
        ({"student": {"reuse_view": 300}, "recipe": {"mix_prob": 0.0}}, ["reuse_view", "teacher_logits.views", "300"]),
        ({"student": {"reuse_view": 0, "distillation": "none"}, "recipe": {"mix_prob": 0.0}}, ["reuse_view", "distillation"]),
        (
            {"variants": {"hard": {"reuse_view": 0}}, "recipe": {"mixup_alpha": 0.0, "cutmix_alpha": 0.0},
             "finetune": {"from": "hard"}},
            ["finetune.from", "reuse_view", "hard"],
        ),
        ({"recipe": {"scale": [0.9, 0.1]}}, ["recipe.scale", "low <= high"]),
        ({"recipe": {"auto_augment": "rand-m9"}}, ["recipe.auto_augment", "-inc1"]),
        ({"recipe": {"auto_augment": "original-m9"}}, ["recipe.auto_augment", "'m9'", "original-m9"]),
        ({"recipe": {"auto_augment": "3a"}}, ["recipe.auto_augment", "original", "'3a'"]),
        ({"recipe": {"color_jitter": 1.5}}, ["recipe.color_jitter", "1.5"]),
    ],
)
def test_impossible_combination_is_refused_with_the_keys_named(values, named):
    message = refusal(values)
    assert [part for part in named if part not in message] == []


def test_variant_whose_batch_does_not_hold_the_accumulation_steps_is_refused():
    values = {"student": {"accumulation": 16}, "variants": {"hard": {"batch_size": 64}}}
    assert "accumulation" in refusal(values)


def test_refusals_end_with_exit_code_2():
    with pytest.raises(UsageError) as caught:
        resolve({"nmae": "x"}, (), "trial.yaml")
    assert caught.value.exit_code == 2


@pytest.mark.parametrize("text", ["a: 1\na: 2", "s: {b: 1, b: 2}", "l:\n- b: 1\n  b: 1\n"])
def test_duplicate_yaml_key_is_refused(text):
    with pytest.raises(UsageError, match="duplicate key"):
        parse_yaml(text, "trial.yaml")


@pytest.mark.parametrize(
    "text", ["a: [1", "a: b: c", "\tx", "name: 2024-13-45", "seed: 0x_", "!!python/name:os.system"]
)
def test_text_that_is_no_yaml_is_refused_with_its_file(text):
    with pytest.raises(UsageError, match="trial.yaml"):
        parse_yaml(text, "trial.yaml")


def test_file_that_is_no_text_is_refused_with_its_name(tmp_path):
    path = tmp_path / "picture.yaml"
    path.write_bytes(b"\xff\xd8\xff\xe0\x00")
    with pytest.raises(UsageError, match="picture.yaml"):
        load_config(path)


def test_missing_file_is_refused_with_its_name(tmp_path):
    with pytest.raises(UsageError, match="absent.yaml"):
        load_config(tmp_path / "absent.yaml")


@pytest.mark.parametrize(
    ("text", "number"), [("5e-4", 5e-4), ("1e3", 1000.0), ("-1.5E+3", -1500.0), (".5", 0.5), ("2.", 2.0)]
)
def test_yaml_number_with_exponent_or_point_is_a_float(text, number):
    value = parse_yaml(text, "trial.yaml")
    assert type(value) is float and value == number


@pytest.mark.parametrize("text", ["5e", "e5", "1-2", "5e-4x", "v1.0", "1.2.3"])
def test_yaml_word_with_digits_stays_a_word(text):
    assert parse_yaml(text, "trial.yaml") == text


def test_file_and_overrides_are_laid_on_the_defaults(tmp_path):
    path = tmp_path / "trial.yaml"
    path.write_text("student: {epochs: 7, lr: 0.1}\n")
    student = load_config(path, ("student.lr=1e-3",)).student
    assert student == Student(epochs=7, lr=1e-3)


def test_override_without_a_value_is_refused():
    assert "section.key=value" in refusal({}, ("student.lr",))


def test_empty_file_is_the_defaults():
    assert resolve(parse_yaml("", "trial.yaml"), (), "trial.yaml") == Config()


models = st.text(st.characters(exclude_characters=":/"), max_size=12).map("x".__add__)
words = st.text(max_size=12).map("x".__add__)  # the x: words that look like numbers have their own test
json_values = st.recursive(
    st.none() | st.booleans() | st.integers() | st.floats(allow_nan=False, allow_infinity=False) | words,
    lambda inner: st.lists(inner, max_size=3) | st.dictionaries(words, inner, max_size=3),
    max_leaves=5,
)
fractions = st.floats(0, 1)
student_names = st.from_regex(r"[A-Za-z0-9_][A-Za-z0-9._-]{0,11}", fullmatch=True).filter(
    lambda name: name not in ("truth", "teacher", "finetuned")
)


@st.composite
def configs(draw) -> Config:
    group = draw(st.sampled_from([2, 8, 64]))
    repeats = draw(st.integers(1, 4))
    block = repeats * draw(st.integers(1, 5))
    names = draw(st.lists(student_names, min_size=1, max_size=3, unique=True))
    accumulation = draw(st.integers(1, 3))
    training = {"batch_size": group * accumulation * draw(st.integers(1, 9)), "accumulation": accumulation}
    variants = st.fixed_dictionaries(
        {}, optional={"lr": fractions, "alpha": fractions, "model": models, "distillation": st.just("none")}
    )
    return Config.model_validate(
        {
            "name": draw(st.from_regex(r"x[A-Za-z0-9._-]{0,99}", fullmatch=True)),
            "data": {"train": draw(words), "max_per_class": draw(st.none() | st.integers(1, 9))},
            "recipe": {
                "seed": draw(st.integers(-(2**63), 2**63 - 1)),
                "size": draw(st.integers(8, 4096)),
                "scale": sorted(draw(st.tuples(st.floats(0.01, 1), st.floats(0.01, 1)))),
                "hflip": draw(fractions),
                "auto_augment": draw(st.sampled_from([None, "rand-inc1", "rand-m9-mstd0.5-inc1", "original"])),
                "color_jitter": draw(fractions),
                "mean": draw(st.lists(fractions, min_size=3, max_size=3)),
                "group_size": group,
                "repeats": repeats,
                "block": block,
            },
            "teacher": training | {"kwargs": draw(st.dictionaries(words, json_values, max_size=3))},
            "teacher_logits": {
                "views": block * draw(st.integers(1, 9)),
                "kind": draw(st.sampled_from(["topk", "dense"])),
            },
            "student": training
            | {
                "clip_grad": draw(st.none() | st.floats(1e-9, 1e9)),
                "lr": draw(st.floats(0, 1)),
                "weight_decay": draw(st.floats(0, 1e-5)),
                "distillation": draw(st.sampled_from(["none", "soft", "hard"])),
            },
            "students": names,
            "variants": {name: draw(variants) for name in names},
            "finetune": training | {"from": draw(st.lists(st.sampled_from(names), unique=True)), "views": block},
        }
    )


@property_settings
@given(configs())
def test_a_dumped_configuration_reads_back_as_itself(config):
    assert resolve(parse_yaml(dump(config), "dumped"), (), "dumped") == config


def test_a_dumped_configuration_names_the_finetuned_student_by_from():
    assert parse_yaml(dump(Config()), "dumped")["finetune"]["from"] == []


@pytest.mark.parametrize("word", ["1e3", "09", "5e-4", "1_0", "1:30", "null", "no", "~", "1.", "2024-01-01"])
def test_a_word_that_yaml_may_read_otherwise_is_dumped_as_a_word(word):
    config = Config(data={"train": word})
    assert parse_yaml(dump(config), "dumped")["data"]["train"] == word


def test_variant_overrides_the_student():
    values = {"variants": {"hard": {}, "long": {"epochs": 1000}}, "student": {"lr": 1e-3}}
    config = resolve(values, (), "trial.yaml")
    assert config.student_named("long") == Student(lr=1e-3, epochs=1000)


def test_student_that_is_no_variant_is_refused_with_the_variants():
    with pytest.raises(UsageError, match="'soft'(.|\n)*one of hard"):
        Config().student_named("soft")


def test_finetune_recipe_differs_in_nothing_but_the_size():
    assert Config().finetune_recipe() == Recipe(size=384)


@property_settings
@given(configs())
def test_equal_configurations_have_equal_fingerprints(config):
    assert fingerprint(resolve(parse_yaml(dump(config), "dumped"), (), "dumped")) == fingerprint(config)


CHANGED = {
    "seed": 1,
    "size": 225,
    "scale": (0.09, 1.0),
    "ratio": (0.75, 1.3),
    "hflip": 0.4,
    "auto_augment": None,
    "color_jitter": 0.4,
    "erase_prob": 0.0,
    "mean": (0.5, 0.456, 0.406),
    "std": (0.229, 0.224, 0.5),
    "mixup_alpha": 0.0,
    "cutmix_alpha": 0.5,
    "mix_prob": 0.9,
    "switch_prob": 0.4,
    "group_size": 32,
    "repeats": 1,
    "block": 60,
}


@pytest.mark.parametrize("field", Recipe.model_fields)
def test_fingerprint_differs_for_a_changed_recipe_field(field):
    assert fingerprint(Recipe(**{field: CHANGED[field]})) != fingerprint(Recipe())


def test_fingerprint_is_the_same_for_an_integer_written_as_float_or_int():
    assert fingerprint(Recipe(cutmix_alpha=1)) == fingerprint(Recipe(cutmix_alpha=1.0))


def test_result_fields_ignore_workers():
    assert fingerprint(result_fields(Student(workers=1))) == fingerprint(result_fields(Student(workers=2)))


def test_result_fields_include_the_learning_rate():
    assert fingerprint(result_fields(Student(lr=1e-3))) != fingerprint(result_fields(Student(lr=2e-3)))


@pytest.mark.parametrize(
    ("key", "value"),
    [
        ("student.epochs", 300),
        ("student.batch_size", 1024),
        ("student.optimizer", "adamw"),
        ("student.lr", 5e-4),
        ("student.min_lr", 1e-5),
        ("student.warmup_lr", 1e-6),
        ("student.warmup_epochs", 5),
        ("student.weight_decay", 0.05),
        ("student.smoothing", 0.1),
        ("student.dropout", 0.0),
        ("student.drop_path", 0.1),
        ("student.clip_grad", None),
        ("student.ema_decay", 0.99996),
        ("student.distillation", "hard"),
        ("student.alpha", 0.5),
        ("recipe.size", 224),
        ("recipe.scale", (0.08, 1.0)),
        ("recipe.ratio", (3 / 4, 4 / 3)),
        ("recipe.hflip", 0.5),
        ("recipe.auto_augment", "rand-m9-mstd0.5-inc1"),
        ("recipe.color_jitter", 0.3),
        ("recipe.erase_prob", 0.25),
        ("recipe.mixup_alpha", 0.8),
        ("recipe.cutmix_alpha", 1.0),
        ("recipe.mix_prob", 1.0),
        ("recipe.switch_prob", 0.5),
        ("recipe.group_size", 64),
        ("recipe.repeats", 3),
        ("teacher.model", "regnety_160"),
        ("finetune.size", 384),
        ("finetune.epochs", 30),
        ("finetune.batch_size", 512),
        ("finetune.lr", 5e-6),
        ("finetune.min_lr", None),
        ("finetune.weight_decay", 1e-8),
        ("evaluate.crop", 0.875),
    ],
)
def test_default_is_the_papers(key, value):
    assert read(Config(), key) == value


@pytest.mark.parametrize("path", CONFIGS, ids=lambda path: path.name)
def test_shipped_configuration_loads(path):
    assert isinstance(load_config(path), Config)


def test_an_unknown_key_similar_to_none_is_refused_with_the_valid_ones():
    message = refusal({}, ("lr=3",))
    assert "an unknown key, lr" in message and "valid keys: data" in message


@pytest.mark.parametrize("override", ["..=1", ".=1", "student..lr=1", "=1", "a." * 5000 + "a=1"])
def test_an_override_without_a_key_is_refused(override):
    assert "section.key=value" in refusal({}, (override,))


KWARGS = {"patch_size": 8, "embed_dim": 128}


def test_an_override_of_one_argument_keeps_the_others():
    config = resolve({"student": {"kwargs": KWARGS}}, ("student.kwargs.depth=3",), "trial.yaml")
    assert config.student.kwargs == KWARGS | {"depth": 3}


def test_an_override_of_all_arguments_replaces_them():
    config = resolve({"student": {"kwargs": KWARGS}}, ("student.kwargs={depth: 3}",), "trial.yaml")
    assert config.student.kwargs == {"depth": 3}


def test_an_override_of_one_variant_keeps_the_others_and_its_other_keys():
    values = {"variants": {"hard": {"lr": 0.1}, "token": {}}, "teacher_logits": {"kind": "dense"}}
    config = resolve(values, ("variants.hard.distillation=soft",), "trial.yaml")
    assert config.variants == {"hard": {"lr": 0.1, "distillation": "soft"}, "token": {}}


def test_a_variant_lays_its_arguments_on_the_students():
    values = {"student": {"kwargs": KWARGS}, "variants": {"hard": {"kwargs": {"depth": 3, "embed_dim": 64}}}}
    assert resolve(values, (), "trial.yaml").student_named("hard").kwargs == KWARGS | {"depth": 3, "embed_dim": 64}


def test_a_mistake_on_the_command_line_is_not_blamed_on_the_file():
    message = refusal({"student": {"lr": 0.1}}, ("student.epcohs=3",))
    assert message.startswith("command line (student.epcohs=3): student.epcohs\n")


def test_a_mistake_of_a_variant_on_the_command_line_is_not_blamed_on_the_file():
    assert refusal({}, ("variants.hard.lr=fast",)).startswith("command line (variants.hard.lr=fast): variants.hard.lr")


def test_a_mistake_in_the_file_is_not_blamed_on_the_command_line():
    assert refusal({"student": {"epcohs": 3}}, ("student.lr=0.1",)).startswith("trial.yaml: student.epcohs\n")


LAUGHS = "a0: &a0 [x, x, x, x, x, x, x, x, x]\n" + "".join(
    f"a{n}: &a{n} [{', '.join([f'*a{n - 1}'] * 9)}]\n" for n in range(1, 9)
)
MERGED = "a0: &a0 {x: 1}\n" + "".join(f"a{n}: &a{n} {{<<: [{', '.join([f'*a{n - 1}'] * 9)}]}}\n" for n in range(1, 9))


@pytest.mark.parametrize(
    ("text", "expected"),
    [
        (LAUGHS, "values"),
        (MERGED, "values"),
        ("a: &a [*a]", "levels"),
        ("[" * 5000 + "]" * 5000, "levels"),
        ("[" * 30 + "]" * 30, "levels"),
        ("".join(f"key{n}: {n}\n" for n in range(20_000)), "characters"),
        ("".join(f"k{n}: 1\n" for n in range(11_000)), "values"),
        ("a: " + "9" * 5000, "digits"),
        ("a: !!bool x", "x"),
        ('a: !!int ""', "index"),
        ("a: !!timestamp x", "trial.yaml"),
    ],
    ids=["aliases", "merges", "itself", "depth", "a bit deep", "size", "keys", "digits", "bool", "int", "time"],
)
def test_yaml_that_would_expand_is_refused_before_it_does(text, expected):
    with pytest.raises(UsageError) as caught:
        parse_yaml(text, "trial.yaml")
    assert expected in str(caught.value) and len(str(caught.value)) < 2000


def test_a_variant_may_share_keys_with_another_by_an_alias():
    text = "variants: {hard: &h {lr: 0.1}, long: {<<: *h, epochs: 900}}"
    assert resolve(parse_yaml(text, "t"), (), "t").student_named("long") == Student(lr=0.1, epochs=900)


def test_a_file_without_end_is_refused():
    with pytest.raises(UsageError, match=f"{MAX_CHARACTERS:,}"):
        load_config("/dev/zero")


@pytest.mark.parametrize(
    "values", [{"student": {"lr": "x" * 90_000}}, {"x" * 90_000: 1}, {"student": {"epochs": 1 << 200_000}}],
    ids=["value", "key", "number"],
)  # fmt: skip
def test_a_refusal_shows_the_beginning_of_a_long_value(values):
    assert len(refusal(values)) < 5000


@pytest.mark.parametrize("name", ["..", ".", ".hidden", "-x", "a/b", "", "a b", "x" * 101, "a\n"])
def test_a_name_that_is_no_folder_of_its_own_is_refused(name):
    assert "name" in refusal({"name": name})
    assert refusal({"variants": {name: {}}, "students": []})


@pytest.mark.parametrize("work", ["s4://bucket/x", "", "a::b", "filecache::s3://b", "a%41", "a\nb", "a\0b"])
def test_a_work_folder_with_special_characters_is_refused(work):
    message = refusal({"work": work})
    assert message.startswith("trial.yaml: work\n") and repr(work) in message


@pytest.mark.parametrize("work", ["work", "/a b/c", "s3://bucket/x", "memory://x", "file:///x"])
def test_a_work_folder_or_url_is_taken(work):
    assert resolve({"work": work}, (), "trial.yaml").work == work


def test_the_home_folder_is_meant_by_a_tilde(monkeypatch):
    monkeypatch.setenv("HOME", "/home/me")
    assert resolve({"work": "~/w", "teacher": {"weights": "~/t.pth"}}, (), "t").work == "/home/me/w"


@pytest.mark.parametrize(
    "key", ["teacher_logits.views", "finetune.views", "student.epochs", "student.batch_size", "recipe.seed",
            "student.seed", "student.workers", "teacher_logits.top_k", "recipe.block", "student.warmup_epochs"],
)  # fmt: skip
def test_a_number_beyond_what_any_run_could_do_is_refused(key):
    for number in (10**20, 2**64, 10**5000):
        assert refusal(nested(key, number)).startswith(f"trial.yaml: {key}\n")


@pytest.mark.parametrize("text", ["{0..3", "0..3}", "}{", "{a,{b}"])
def test_shards_whose_braces_are_not_closed_are_refused(text):
    assert "data.train must have balanced braces" in refusal({"data": {"source": "shards", "train": f"/data/x-{text}.tar"}})


@pytest.mark.parametrize("text", ["2024-01-01", "!!set {a}", "!!binary YQ==", ".nan", "{1: 2}", "[{2: 1}]"])
def test_arguments_that_are_no_plain_values_are_refused(text):
    message = refusal(parse_yaml(f"student: {{kwargs: {{a: {text}}}}}", "t"))
    assert message.startswith("trial.yaml: student.kwargs\n") and "found:" in message


keys = st.sampled_from([*Config.model_fields, *Student.model_fields, *Recipe.model_fields, "hard", "x", "..", ""])
leaves = st.none() | st.booleans() | st.integers(-(10**25), 10**25) | st.floats() | st.text(max_size=9) | keys
trees = st.recursive(
    leaves, lambda inner: st.lists(inner, max_size=4) | st.dictionaries(keys, inner, max_size=5), max_leaves=25
)
mutations = st.lists(st.tuples(st.integers(0, 4000), st.sampled_from("\0\t\n :{}[]&*!|>'\"%@`-?,#~<x1.é")), max_size=12)


@settings(derandomize=True, deadline=None, max_examples=100)
@given(trees)
def test_a_configuration_of_anything_is_accepted_or_refused_with_a_usage_error(values):
    try:
        assert isinstance(resolve(values, (), "fuzz"), Config)
    except UsageError as error:
        assert len(str(error)) < 10_000


@settings(derandomize=True, deadline=None, max_examples=100)
@given(mutations, keys, keys, st.text(max_size=12))
def test_a_damaged_params_yaml_is_accepted_or_refused_with_a_usage_error(changes, section, key, value):
    text = list(dump(Config()))
    for place, character in changes:
        text[place % len(text)] = character
    try:
        resolve(parse_yaml("".join(text), "fuzz"), (f"{section}.{key}={value}",), "fuzz")
    except UsageError as error:
        assert "fuzz" in str(error) or "command line" in str(error) or "override" in str(error)


@pytest.mark.parametrize(("written", "students"), [
    ("{from: []}", []), ("{from: hard}", ["hard"]), ("{from: [hard, long]}", ["hard", "long"]),
    ("{size: 320}", []),
])  # fmt: skip
def test_any_number_of_students_is_fine_tuned(written, students):
    text = f"{{students: [hard, long], variants: {{hard: {{}}, long: {{}}}}, finetune: {written}}}"
    config = resolve(parse_yaml(text, "t"), (), "t")
    assert config.finetune.students == students
    assert parse_yaml(dump(config), "dumped")["finetune"]["from"] == students  # the list that DVC's matrix needs


def test_a_teacher_is_needed_where_a_student_is_distilled():
    needed = lambda *overrides: [resolve({}, overrides, "t").needs_teacher(p) for p in ("train-student", "finetune")]  # noqa: E731
    none = "variants.none.distillation=none"
    assert needed() == [True, False]
    assert needed("finetune.from=hard") == [True, True]
    assert needed(none, "students=[none]", "finetune.from=none") == [False, False]
    assert needed(none, "students=[none, hard]", "finetune.from=none") == [True, False]
    assert needed("students=[]", "finetune.from=hard", "finetune.weights=w.pth") == [False, True]


def test_a_fine_tuned_students_teacher_sees_what_it_was_trained_at_unless_it_is_adapted():
    size = lambda *overrides: resolve({}, overrides, "t").teacher_size("finetune")  # noqa: E731
    assert (size(), size("finetune.teacher_size=384")) == (224, 384)
    assert size("teacher_finetune.epochs=1") == 384
    assert "finetune.teacher_size" in refusal({}, ("teacher_finetune.epochs=1", "finetune.teacher_size=224"))


def test_the_paper_fine_tunes_its_largest_student_alone_with_a_teacher_that_is_adapted():
    tuned = {path.stem: load_config(path).finetune.students for path in CONFIGS if path.stem.startswith("imagenet-deit")}
    assert tuned == {"imagenet-deit-tiny": [], "imagenet-deit-small": [], "imagenet-deit-base": ["token"]}
    base = load_config(next(path for path in CONFIGS if path.stem == "imagenet-deit-base"))
    assert base.teacher_finetune.epochs > 0 and base.teacher_size("finetune") == base.finetune.size == 384


@pytest.mark.parametrize("name", ["finetuned", "token-finetuned"])
def test_a_student_is_not_named_as_what_comes_of_another(name):
    assert "finetuned" in refusal({"variants": {"hard": {}, name: {}}})
