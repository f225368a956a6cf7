"""Settings of norm control as setups."""

from __future__ import annotations

from benchmarks.norm_control import SETTINGS, make_setups


def test_settings_and_rates_are_setups() -> None:
    setups = make_setups(("clamp", "clamp:2", "none", "sphere"), (0.005, 0.02))
    found = {
        name: (config.norm_control, config.norm_limit, config.learning_rate)
        for name, config in ((name, setup.inversion(100, ())) for name, setup in setups.items())
        if config.norm_control != "none"
    }
    assert found == {
        "clamp-at-0.005": ("clamp", 4.0, 0.005), "clamp-at-0.02": ("clamp", 4.0, 0.02),
        "clamp-2-at-0.005": ("clamp", 2.0, 0.005), "clamp-2-at-0.02": ("clamp", 2.0, 0.02),
        "sphere-at-0.005": ("sphere", 1.0, 0.005), "sphere-at-0.02": ("sphere", 1.0, 0.02),
    }  # fmt: skip
    assert list(make_setups(SETTINGS, (0.005,))) == ["clamp", "none", "clamp-1", "clamp-2", "clamp-8", "sphere"]
