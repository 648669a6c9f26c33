"""Configs: plain JSON and back, what is refused and how it is worded, and that they cost nothing to import."""

import dataclasses
import math
import re
import subprocess
import sys

import pytest

from clipjax.config import (
    BagOfWordsConfig,
    CbowConfig,
    Config,
    DataConfig,
    DecoderConfig,
    GroupRole,
    ImagePool,
    LossKind,
    MeshConfig,
    MixtureSource,
    ResNetConfig,
    SamePair,
    TaskConfig,
    TaskKind,
    TextTruncation,
    due_tasks,
    resolve_mesh,
    steps_of,
    total_steps,
)
from clipjax.config.ranges import RANGES
from clipjax.config.serialization import check_override, field_type, field_value, from_dict, take_apart, to_dict
from clipjax.config.validation import validate, validate_devices

pytestmark = pytest.mark.newest


def valid() -> Config:
    config = Config()
    config.data.train = "tfds:scenes/train"
    return config


def set_field(config: Config, path: str, value: object) -> None:
    parent, _, name = path.rpartition(".")
    setattr(field_value(config, parent) if parent else config, name, value)


def test_to_dict_and_back_changes_nothing():
    config = valid()
    config.optim.freeze = ("image/.*",)
    config.optim.ema_decay = 0.99
    config.eval.tasks["scenes/val"] = TaskConfig(source="tfds:scenes/val", classes="scenes", templates="scenes")
    assert from_dict(to_dict(config)) == config


@pytest.mark.parametrize(
    ("values", "message"),
    [
        ({"sead": 1}, "unknown ['sead']"),
        ({"seed": "1"}, "config.seed='1' must be of type int"),
        ({"seed": True}, "config.seed=True must be of type int"),
        ({"optim": {"learning_rate": "fast"}}, "config.optim.learning_rate='fast' must be of type float"),
        ({"loss": {"kind": "hinge"}}, "config.loss.kind='hinge' must be one of softmax"),
        ({"optim": 3}, "config.optim: unknown 3"),
        ([], "config: unknown []"),
    ],
)
def test_from_dict_refuses_what_it_does_not_know(values, message):
    with pytest.raises(ValueError, match=re.escape(message)):
        from_dict(values)


@pytest.mark.parametrize(
    ("path", "value", "message"),
    [
        ("data.train", "", "data.train='' must name a source"),
        ("global_batch_size", 0, "global_batch_size=0 must be greater than 0"),
        ("global_batch_size", 1, "global_batch_size=1: a contrastive loss compares the pairs of a batch"),
        ("optim.learning_rate", float("nan"), "optim.learning_rate=nan must be greater than 0"),
        ("optim.beta2", 1.5, "optim.beta2=1.5 must be at least 0 and below 1"),
        ("seed", -1, "seed=-1 must not be negative"),
        ("seed", "one", "seed='one' must be of type int"),
        ("total_examples", 10, "total_examples=10 must be at least one global_batch_size=256"),
        ("warmup_examples", 10**9, "must not exceed total_examples"),
        ("mesh.data", 0, "mesh.data=0 must be at least 1, or -1 to fill up"),
        ("mesh.data", 3, "global_batch_size=256 must be divisible by 3"),
        ("mesh.tensor", 3, "model.text.num_heads=8 must be divisible by 3 (mesh.tensor=3); nearest: 6, 9"),
        ("model.image.patch_size", 30, "model.image.image_size=224 must be a multiple of model.image.patch_size=30"),
        (
            "model.image.ln_post_after_pool",
            True,
            "would change nothing with model.image.pool=class; it is for pool=average",
        ),
        ("model.text.num_heads", 7, "model.text.width=512 must be a multiple of model.text.num_heads=7"),
        ("model.text.context_length", 2, "at least 3"),
        ("model.init_logit_scale", 200.0, "must not exceed model.max_logit_scale=100.0"),
        ("microbatch_size", 63, "microbatch_size=63 must divide global_batch_size="),
        ("microbatch_size", 0, "microbatch_size=0 must be at least 1, or None"),
        ("microbatch_size", -8, "microbatch_size=-8 must be at least 1, or None"),
        ("loss.tile", 0, "loss.tile=0 must be at least 1"),
        ("loss.kind", LossKind.SIGMOID, "model.init_logit_bias=None: loss.kind=sigmoid needs a bias"),
        ("model.init_logit_bias", -10.0, "softmax would ignore it"),
        ("loss.label_smoothing", 1.0, "loss.label_smoothing=1.0 must be at least 0 and less than 1"),
        ("loss.group_role", GroupRole.POSITIVE, "loss.group_role=positive needs loss.same_pair=index or caption"),
        ("loss.distill_weight", 2.0, "loss.distill_weight=2.0 needs loss.distill_from, a clipjax checkpoint"),
        ("loss.distill_weight", -1.0, "loss.distill_weight=-1.0 must be greater than 0"),
        ("loss.gamma", 0.0, "loss.gamma=0.0 must be greater than 0 and at most 1"),
        ("loss.gamma", 0.5, "loss.gamma=0.5: loss.kind=softmax would ignore it; only global uses it"),
        ("loss.gamma_decay_examples", -1, "loss.gamma_decay_examples=-1 must be at least 0"),
        ("loss.epsilon", 0.0, "loss.epsilon=0.0 must lie between 1e-30 and 1"),
        ("loss.rho", math.nan, "loss.rho=nan must be at least 0"),
        ("mesh.slice", -1, "mesh.slice=-1 must be at least 1, or None for those of the hardware"),
        ("loss.distill_from", "", "loss.distill_from='' must name a clipjax checkpoint"),
        ("optim.freeze", ("(",), "is no regular expression"),
        ("checkpoint.best_metric", "val:top1", "'val:top1' would only see the last step; set eval.every_examples"),
        ("eval.tasks", {"a": TaskConfig(every_examples=0)}, "eval.tasks.a.every_examples=0 must be greater than 0"),
        ("eval.tasks", {"a": TaskConfig(source="x")}, "zero_shot needs classes and templates"),
        ("eval.tasks", {"a": TaskConfig(classes="scenes", templates="plain")}, "eval.tasks.a.source='' must name"),
        ("data.std", (0.0, 1.0, 1.0), "a standard deviation must be greater than 0"),
        ("data.mean", (0.5, math.nan, 0.5), "data.mean[1]=nan must be a finite number"),
        ("model.init_logit_bias", math.inf, "model.init_logit_bias=inf must be a finite number"),
        ("model.caption", DecoderConfig(mlp_dim=-4), "model.caption.mlp_dim=-4 must be greater than 0"),
        ("model.caption", DecoderConfig(depth=0), "model.caption.depth=0 must be at least 1"),
        ("model.text", CbowConfig(context_length=1), "model.text.context_length=1 must hold start, a token and end"),
        ("eval.tasks", {"a": TaskConfig(source="x", max_examples=0)}, "eval.tasks.a.max_examples=0 must be greater"),
        (
            "data.mixture",
            {"a": MixtureSource(source="x")},
            "would be ignored beside data.mixture; leave one of them out",
        ),
        (
            "data.mixture",
            {"a": MixtureSource(source="x")},
            "loss.same_pair=none must be index or caption with data.mix",
        ),
        ("data.mixture", {"a": MixtureSource()}, "data.mixture.a.source='' must name a source"),
        ("data.mixture", {"a": MixtureSource(source="x", weight=0)}, "data.mixture.a.weight=0 must be greater than 0"),
        (
            "data.cache_dir",
            "x",
            "data.cache_dir='x' would be ignored: no source is tars, Parquet, ArrayRecord or TFDS data in a",
        ),
        ("data.cache_gib", 7.0, "data.cache_gib=7.0 would be ignored without data.cache_dir"),
        ("data.captions", {"txt": 0.0}, "data.captions.txt=0.0 must be greater than 0"),
        ("data.captions", {"txt": math.nan}, "data.captions.txt=nan must be greater than 0"),
        ("data.captions", {"txt": "1"}, "data.captions.txt='1' must be of type float"),
        ("data.captions", {"": 1.0}, "data.captions={'': 1.0} has a field without a name"),
        (
            "data.mixture",
            {"a": MixtureSource(source="x", captions={"/": 1.0})},
            "data.mixture.a.captions={'/': 1.0} has a field without a name",
        ),
        (
            "data.mixture",
            {"a": MixtureSource(source="x", captions={"b": -1.0})},
            "data.mixture.a.captions.b=-1.0 must be greater than 0",
        ),
        (
            "data.mixture",
            {"a": MixtureSource(source="x.csv", caption_field="y", captions={"b": 1.0})},
            "data.mixture.a.caption_field='y' would be ignored beside data.mixture.a.captions",
        ),
        ("data.captions_per_image", 0, "data.captions_per_image=0 must be 1 or 2"),
        ("data.captions_per_image", 3, "data.captions_per_image=3 must be 1 or 2"),
        ("init_keep_positions", 20, "init_keep_positions=20 needs init_from, a clipjax checkpoint"),
        ("init_keep_positions", -1, "init_keep_positions=-1 must not be negative"),
        ("data.order_block", 0, "data.order_block=0 must be greater than 0"),
        ("seed", 2**63, "seed=9223372036854775808 must be less than 2**63"),
    ],
)
def test_validate_names_field_value_and_rule(path, value, message):
    config = valid()
    set_field(config, path, value)
    with pytest.raises(ValueError, match=re.escape(message)):
        validate(config)


@pytest.mark.parametrize(
    ("change", "message"),
    [
        (lambda c: setattr(c.loss, "kind", LossKind.GLOBAL), "loss.kind=global, which remembers one text"),
        (lambda c: setattr(c.model, "caption", DecoderConfig()), "model.caption, which predicts one text"),
        (lambda c: setattr(c.loss, "distill_from", "runs/x"), "loss.distill_from, whose teacher reads one text"),
    ],
)
def test_what_two_captions_of_an_image_do_not_define_is_refused(change, message):
    config = valid()
    config.data.captions_per_image = 2
    validate(config)
    change(config)
    with pytest.raises(ValueError, match=f"data.captions_per_image=2 is not defined with {message}"):
        validate(config)


def test_a_caption_field_that_captions_hide_is_refused():
    config = valid()
    config.data.train, config.data.caption_field, config.data.captions = "a.csv", "alt", {"long": 1.0}
    with pytest.raises(ValueError, match="data.caption_field='alt' would be ignored: data.captions names the columns"):
        validate(config)
    config.eval.tasks["a"] = TaskConfig(kind=TaskKind.RETRIEVAL, source="b.csv")
    validate(config)
    config.eval.tasks.clear()
    config.loss.same_pair, config.data.train, config.data.captions = SamePair.INDEX, "", {}
    config.data.mixture = {name: MixtureSource(source=f"{name}.csv", captions={"long": 1.0}) for name in "ab"}
    with pytest.raises(ValueError, match="data.caption_field='alt' would be ignored"):
        validate(config)
    config.data.mixture["a"].source, config.data.mixture["b"].captions = "b.csv", {}
    validate(config)  # the one table is read twice, and once by data.caption_field


def test_lines_of_captions_are_for_retrieval_alone():
    config = valid()
    config.eval.tasks["t"] = TaskConfig(
        kind=TaskKind.IMAGE_RETRIEVAL, source="a.tar", gallery="b.tar", captions_by_line=True
    )
    with pytest.raises(ValueError, match="eval.tasks.t.captions_by_line=True: image_retrieval would ignore it"):
        validate(config)
    config.eval.tasks["t"] = TaskConfig(kind=TaskKind.RETRIEVAL, source="a.tar", captions_by_line=True)
    validate(config)


@pytest.mark.parametrize(
    ("fields", "message"),
    [
        ({"source": "a.tar", "image_field": "x"}, r"eval.tasks.t.image_field='x' would be ignored: 'a.tar' is neither"),
        ({"source": "a.tar", "caption_field": "x"}, "eval.tasks.t.caption_field='x' would be ignored"),
        (
            {"source": "a.parquet", "tfds_dir": "x"},
            "eval.tasks.t.tfds_dir='x' would be ignored: no source is TFDS data",
        ),
    ],
)
def test_what_a_task_does_not_read_is_refused(fields, message):
    config = valid()
    config.eval.tasks["t"] = TaskConfig(kind=TaskKind.RETRIEVAL, **fields)
    with pytest.raises(ValueError, match=message):
        validate(config)


def test_a_task_reads_its_own_fields_and_else_those_of_the_run():
    data = DataConfig(tfds_dir="all", tfds_image_key="picture", caption_field="alt")
    task = TaskConfig(source="tfds:a/test", tfds_dir="mine", caption_field="text")
    read = task.reads(data)
    assert (read.tfds_dir, read.tfds_image_key, read.tfds_caption_key) == ("mine", "picture", "text")
    assert (read.image_field, read.caption_field) == (None, "text")
    assert TaskConfig(source="a").reads(data) == data


def test_a_cache_that_only_a_tasks_own_tfds_data_needs_is_used():
    config = valid()
    config.data.cache_dir = "copies"
    with pytest.raises(ValueError, match="data.cache_dir='copies' would be ignored"):
        validate(config)
    config.eval.tasks["t"] = TaskConfig(kind=TaskKind.RETRIEVAL, source="tfds:a/test", tfds_dir="gs://b/tfds")
    validate(config)


def test_captions_come_back_from_json():
    config = valid()
    config.data.captions, config.data.text_truncation = {"a/b": 1, "txt": 0.5}, TextTruncation.BLOCK
    again = from_dict(to_dict(config))
    assert again == config and again.data.captions == {"a/b": 1.0, "txt": 0.5}
    with pytest.raises(ValueError, match=r"data.text_truncation='syntax' must be one of none, random, block"):
        from_dict({"data": {"text_truncation": "syntax"}})


def test_a_memory_that_cannot_be_split_evenly_is_refused():
    config = valid()
    config.loss.kind, config.global_batch_size, config.eval.batch_size = LossKind.GLOBAL, 7 * 64, 7 * 64
    validate(config)
    with pytest.raises(ValueError, match="loss.kind=global .* needs a number of devices that divides 61440"):
        validate_devices(config, num_devices=7, num_processes=1)


def test_validate_lists_everything_that_is_wrong():
    config = valid()
    config.global_batch_size = -1
    config.optim.epsilon = 0.0
    with pytest.raises(ValueError) as caught:
        validate(config)
    assert len(str(caught.value).splitlines()) == 2


def test_validate_accepts_the_defaults():
    validate(valid())


def test_mesh_fills_up():
    assert resolve_mesh(MeshConfig(fsdp=2, tensor=2), 8) == (1, 2, 2, 2)
    assert resolve_mesh(MeshConfig(data=8), 8) == (1, 8, 1, 1)
    with pytest.raises(ValueError, match="8 devices cannot be divided by 3"):
        resolve_mesh(MeshConfig(tensor=3), 8)
    with pytest.raises(ValueError, match="make 4 devices, but there are 8; set one axis to -1"):
        resolve_mesh(MeshConfig(data=4), 8)


def test_validate_devices_names_the_nearest_batch():
    config = valid()
    config.global_batch_size = 100
    with pytest.raises(ValueError, match=r"global_batch_size=100 must be divisible by 8 .*nearest: 96, 104"):
        validate_devices(config, num_devices=8, num_processes=1)
    config.mesh.tensor = -1
    config.mesh.data = 1
    config.global_batch_size = 96
    with pytest.raises(ValueError, match=r"model.image.num_heads=12 must be divisible by 8 \(mesh.tensor=8\)"):
        validate_devices(config, num_devices=8, num_processes=1)


def test_time_is_told_in_examples():
    config = dataclasses.replace(valid(), total_examples=1000, global_batch_size=64)
    assert total_steps(config) == 15
    assert steps_of(0, config) == 0
    assert steps_of(1, config) == 1
    assert steps_of(160, config) == 2
    assert steps_of(170, config) == 3


def test_an_optional_group_can_be_left_out_and_its_fields_changed():
    check_override(Config, "model.caption", None)
    check_override(Config, "model.caption.depth", 3)
    with pytest.raises(ValueError, match="model.caption=3 is int and must be"):
        check_override(Config, "model.caption", 3)
    with pytest.raises(ValueError, match="model.image is a group of fields"):
        check_override(Config, "model.image", None)
    assert take_apart(field_type(Config, "model.caption")).optional  # so that a command line may say none


def number_fields(kind: type, path: str = "") -> dict[str, dataclasses.Field]:
    """All fields of a config that hold numbers, by path, those of every tower and task among them."""
    found = {}
    for item in dataclasses.fields(kind):
        annotation = take_apart(take_apart(kind).fields[item.name])
        inside = f"{path}{item.name}"
        for group in (*annotation.classes, *(take_apart(annotation.values).classes if annotation.values else ())):
            found |= number_fields(group, f"{inside}({group.__name__}).")
        if {annotation.of, *(annotation.items or ())} & {int, float}:
            found[inside] = item
    return found


RULED_TOGETHER = ("microbatch_size", "num_queries", "query_heads", "layers")
"""Numbers whose rule needs another field: `validate` has a sentence for both."""


def test_every_number_has_a_range_beside_it():
    fields = number_fields(Config)
    assert "model(ModelConfig).text(CbowConfig).width" in fields
    assert "eval(EvalConfig).tasks(TaskConfig).max_examples" in fields
    unbounded = [path for path, item in fields.items() if RANGES not in item.metadata]
    assert [path for path in unbounded if path.rpartition(".")[2] not in RULED_TOGETHER] == []


@pytest.mark.parametrize("value", [math.nan, math.inf, -math.inf, -(10**9)])
def test_no_number_takes_nonsense(value):
    """Whatever the field: not a number, an infinity, a large negative number; but a mean and a bias may be negative."""
    config = valid()
    config.model.caption, config.loss.caption_weight = DecoderConfig(), 1.0
    config.eval.tasks["a"] = TaskConfig(source="x", classes="scenes", templates="plain")
    config.data.train, config.data.mixture = "", {"a": MixtureSource(source="x")}
    config.loss.same_pair = SamePair.INDEX
    for path, item in number_fields(Config).items():
        place = (
            re.sub(r"\((\w+)\)", "", path).replace("eval.tasks", "eval.tasks['a']").replace("mixture", "mixture['a']")
        )
        old = field_value(config, place)
        whole = item.type in (int, "int", int | None)
        if "ResNet" in path or "Cbow" in path or "layers" in path or (whole and not isinstance(value, int)):
            continue
        if value == -(10**9) and place in ("data.mean", "model.init_logit_bias"):
            continue
        set_field(config, place, (value,) * 3 if isinstance(old, tuple) else value if old is None else type(old)(value))
        with pytest.raises(ValueError, match=item.name):
            validate(config)
        set_field(config, place, old)
    validate(config)


@pytest.mark.parametrize(
    ("change", "message"),
    [
        (lambda m: setattr(m, "caption", DecoderConfig(mlp_dim=30)), "model.caption.mlp_dim=30 must be divisible by 4"),
        (lambda m: setattr(m.image, "mlp_dim", 30), "model.image.mlp_dim=30 must be divisible by 4"),
        (lambda m: setattr(m.image, "query_heads", 2), "model.image.query_heads=2 must be divisible by 4"),
        (
            lambda m: setattr(m, "image", ResNetConfig(width=4, num_heads=4)),
            "model.image.width=4 must be divisible by 8 (2 * mesh.fsdp=4, as the first layer has half as many",
        ),
        (lambda m: (setattr(m, "caption", BagOfWordsConfig()), setattr(m, "embed_dim", 514)), "model.embed_dim=514"),
    ],
)
def test_sizes_that_the_mesh_splits_must_be_divisible(change, message):
    config = valid()
    config.mesh.fsdp, config.mesh.tensor = 4, 4
    config.model.image.pool = ImagePool.QUERIES
    change(config.model)
    with pytest.raises(ValueError, match=re.escape(message)):
        validate_devices(config, num_devices=16, num_processes=1)


@pytest.mark.parametrize("values", [{"loss": {"kind": ["softmax"]}}, {"model": {"image": {"kind": ["vit"]}}}])
def test_json_of_a_strange_shape_is_refused(values):
    with pytest.raises(ValueError, match="must be one of"):
        from_dict(values)


@pytest.mark.process
def test_import_is_light():
    code = (
        "import sys, time; start = time.process_time(); import clipjax.config, clipjax; "
        "assert time.process_time() - start < 0.3; "
        "heavy = {'jax', 'numpy', 'flax', 'tensorflow', 'grain'} & set(sys.modules); assert not heavy, heavy"
    )
    subprocess.run([sys.executable, "-c", code], check=True)


def test_the_best_metric_needs_an_interval_of_its_task_and_no_interval_is_ignored():
    config = valid()
    config.eval.tasks = {
        name: TaskConfig(source="x", classes="scenes", templates="plain", every_examples=own)
        for name, own in {"often": 1000, "end:x": None}.items()
    }
    config.checkpoint.best_metric = "often:top1"
    validate(config)
    config.checkpoint.best_metric = "end:x:top1"
    with pytest.raises(
        ValueError, match="'end:x:top1' would only see the last step; set eval.every_examples, or every_"
    ):
        validate(config)
    config.eval.every_examples = 2000
    validate(config)
    config.eval.tasks["end:x"].every_examples = 500
    with pytest.raises(ValueError, match="eval.every_examples=2000 would be ignored: each task has its own every_"):
        validate(config)


def test_intervals_are_rounded_to_steps_and_the_last_step_has_all_tasks():
    config = Config(total_examples=100, global_batch_size=10)
    config.eval.tasks = {name: TaskConfig(every_examples=own) for name, own in {"a": 26, "b": 1, "c": None}.items()}
    due = {step: due_tasks(config, step) for step in range(1, 11)}
    assert [step for step in due if "a" in due[step]] == [3, 6, 9, 10]  # 2.6 steps are 3
    assert [step for step in due if "b" in due[step]] == list(range(1, 11)) and [*due[9]] == ["a", "b"]
    assert due[10] == ["a", "b", "c"]
