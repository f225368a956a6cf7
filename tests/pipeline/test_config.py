from __future__ import annotations

import json

import pytest

from pipeline.config import RunConfig
from pipeline.config_file import load_config, parse_config, to_tree


def test_nothing_given_is_all_defaults() -> None:
    assert load_config() == RunConfig()


def test_overrides_win_over_the_file_and_arguments_over_both() -> None:
    toml = 'model = "a"\nseed = 1\n[inversion]\nsteps = 10\nbatch_size = 2\n[inversion.augment]\ncrops = 3\n'
    config = load_config(toml, ["inversion.steps=20", "model=some/hub-id"], seed=7, output=None)
    assert (config.inversion.steps, config.inversion.batch_size, config.inversion.augment.crops) == (20, 2, 3)
    assert (config.model, config.seed, config.output) == ("some/hub-id", 7, "output")


@pytest.mark.parametrize(
    ("override", "value"),
    [
        ("actors.cpus=2", 2.0),
        ("inversion.augment.flip=false", False),
        ("grid.prompts=['{} here']", ("{} here",)),
        ("output=s3://bucket/run", "s3://bucket/run"),
        ('output="quoted # text"', "quoted # text"),
    ],
)
def test_override_values_are_toml_or_bare_words(override: str, value: object) -> None:
    config: object = load_config(overrides=[override])
    for name in override.partition("=")[0].split("."):
        config = getattr(config, name)
    assert config == value


@pytest.mark.parametrize(
    ("override", "message"),
    [
        ("inversion.stepz=3", "inversion.stepz: no such setting; did you mean inversion.steps?"),
        ("inversion.augment.flop=true", "did you mean inversion.augment.flip?"),
        ("inversion.steps=true", "inversion.steps = True"),
        ("inversion.steps=1.5", "inversion.steps = 1.5"),
        ("inversion.steps=lots", "inversion.steps = 'lots'"),
        ("inversion.steps=0", "inversion.steps = 0: must be 1 or more"),
        ("precision=float8", "precision = 'float8'"),
        ("actors.gpus=-1", "actors.gpus = -1"),
        ("actors.compile_cache=cache", "actors.compile_cache = 'cache': must be a URI or an absolute path"),
        ("grid.prompts=['no hole']", "grid.prompts = 'no hole'"),
        ("inversion=3", "inversion = 3"),
        *((f"lease_s={value}", "or 1 to 86,400 seconds") for value in ("inf", "nan", "-1", "1e-9", "1e9")),
        ("actors.drain_s=inf", "actors.drain_s = inf"),
        ("actors.stall_s=inf", "actors.stall_s = inf"),
        ("steps", "write it as key=value"),
        ("seed.x.y=1", "seed.x: no such setting|seed = "),
    ],
)
def test_a_wrong_setting_is_named(override: str, message: str) -> None:
    with pytest.raises(ValueError, match=message.replace("?", r"\?").replace("[", r"\[")):
        load_config(overrides=[override])


def test_a_value_cannot_be_a_section() -> None:
    with pytest.raises(ValueError, match="seed is a value"):
        load_config("seed = 1", ["seed.x=2"])


def test_broken_toml_is_said_to_be() -> None:
    with pytest.raises(ValueError, match="not valid TOML"):
        load_config("seed = = 1")


def test_the_resolved_configuration_survives_json() -> None:
    config = load_config(overrides=["grid.prompts=['{} in space']", "actors.cpus=0.5", "inversion.augment.crops=2"])
    assert parse_config(json.loads(json.dumps(to_tree(config)))) == config


def test_a_base_is_changed_by_file_and_overrides_and_stays_itself() -> None:
    base = to_tree(load_config("seed = 3\n[inversion]\nsteps = 10\nbatch_size = 2\n"))
    config = load_config("[inversion]\nsteps = 20\n", ["evaluation.protocol=paper"], base=base)
    assert (config.seed, config.inversion.steps, config.inversion.batch_size) == (3, 20, 2)
    assert config.evaluation.protocol == "paper"
    assert base["evaluation"]["protocol"] == "quick"


def test_a_gate_on_the_gain_of_clip_t_needs_all_pictures_of_the_word() -> None:
    overrides = ["grid.initializer_prompts=1", "gate.min_clip_t_gain=-0.1"]
    for alone in overrides:
        load_config(overrides=[alone])
    with pytest.raises(ValueError, match=r"grid\.initializer_prompts = 1: must be 0 with gate\.min_clip_t_gain"):
        load_config(overrides=overrides)


@pytest.mark.parametrize("method", ["auto", "amortised", "encoder"])
def test_a_start_chosen_by_the_photos_needs_an_extractor(method: str) -> None:
    overrides = [f"inversion.init.method={method}", "inversion.init.encoder=e.safetensors"]
    assert load_config(overrides=overrides).inversion.init.method == method
    with pytest.raises(ValueError, match=f"extractor = '': must be a CLIP for inversion.init.method '{method}'"):
        load_config(overrides=[*overrides, "extractor=''"])


def test_an_encoder_with_an_extractor_of_its_own_needs_no_scores() -> None:
    overrides = ["inversion.init.encoder=e.safetensors", "inversion.init.extractor=owner/dino", "extractor=''"]
    assert load_config(overrides=overrides).inversion.init.extractor == "owner/dino"


def test_only_an_encoder_needs_no_steps() -> None:
    with pytest.raises(ValueError, match=r"init\.encoder = '': must be the file of an encoder"):
        load_config(overrides=["inversion.init.method=encoder"])
    encoder = ["inversion.init.method=encoder", "inversion.init.encoder=e.safetensors"]
    assert load_config(overrides=[*encoder, "inversion.steps=0"]).inversion.steps == 0
    with pytest.raises(ValueError, match=r"inversion\.steps = 0: must be 1 or more; 0 with init\.method 'encoder'"):
        load_config(overrides=["inversion.steps=0"])


@pytest.mark.parametrize(
    ("overrides", "method"),
    [
        (["inversion.init.encoder=e.safetensors"], "encoder"),
        (["inversion.init.encoder=e.safetensors", "inversion.steps=0"], "encoder"),
        (["inversion.init.encoder=e.safetensors", "inversion.init.method=auto"], "auto"),
        (["inversion.init.encoder="], "words"),
        (["inversion.init.noise=0.1"], "words"),
    ],
)
def test_an_encoder_that_is_named_is_the_start_unless_a_method_is_named(overrides: list[str], method: str) -> None:
    assert load_config(overrides=overrides).inversion.init.method == method


def test_a_method_that_was_resolved_before_stays() -> None:
    base = to_tree(load_config(overrides=["inversion.init.encoder=e.safetensors"]))
    words = to_tree(load_config(overrides=["inversion.init.method=words"], base=base))
    assert load_config(overrides=["inversion.steps=9"], base=words).inversion.init.method == "words"


def test_an_earlier_run_is_another_and_for_amortised_starts() -> None:
    with pytest.raises(ValueError, match=r"init\.earlier_run = 'a': must be empty unless init.method is 'amortised'"):
        load_config(overrides=["inversion.init.earlier_run=a"])
    with pytest.raises(ValueError, match=r"init\.earlier_run = '': must be the output of a run, which .* 'earlier'"):
        load_config(overrides=["inversion.init.method=earlier"])
    earlier = ["inversion.init.method=earlier", "inversion.init.earlier_run=a"]
    assert load_config(overrides=earlier).inversion.init.method == "earlier"
    with pytest.raises(ValueError, match=r"init\.earlier_run = 'a': must be the output of another run"):
        load_config(overrides=["inversion.init.earlier_run=a", "inversion.init.method=amortised"], output="a")
