"""What the studies' scripts refuse: one line that names option, value and remedy, and no folder."""

from pathlib import Path

import pytest

import scripts

EXPERIMENTS = Path(__file__).resolve().parents[2] / "experiments"
EVERY = [  # script by script, what none of them takes
    (["--data", "mars"], "--data 'mars' is unknown; known: mnist5k"),
    (["--preset", "tpu"], "--preset 'tpu' is unknown for mnist5k; known:"),
    (["--seed", "-1"], "--seed -1 must be from 0"),
]
TRAINING = [  # and none that trains
    (["--epochs", "0"], "epochs=0 must be a whole number of at least 1"),
    (["--channels", "0"], "channels=0 must be a whole number of at least 1"),
]
CASES = {
    "accuracy": [
        *EVERY,
        *TRAINING,
        (["--minutes", "0"], "minutes=0.0 must be finite and above 0"),
        (["--minutes", "nan"], "minutes=nan must be finite and above 0"),
        (["--channels", "1000"], "channels=1000: 108,0"),
        (["--time-steps", "0"], "time_steps=0"),
        (["--batch-size", "65"], "batch_size=65 is larger than the data: 64 training images"),
        (["--learning-rate", "0"], "learning_rate=0.0"),
        (["--ema", "1"], "ema=1.0 must be in [0, 1)"),
        (["--mix", "cut"], "mix='cut' is unknown"),
        (["--cell", "0>3:conv4"], "4"),
        (["--cell", "0>1:conv3"], "0>3"),
        (["--norm", "batch"], "norm='batch' is unknown"),
        (["--data", "cifar10", "--data-dir", "/nowhere"], "tools/prepare_data.py cifar10"),
    ],
    "beyond_enumeration": [
        *EVERY,
        (["--kernel-set", "2,3"], "--kernel-set '2,3': want different odd sizes"),
        (["--kernel-set", "x"], "--kernel-set 'x'"),
        (["--budget", "7"], "--budget 7 must be at least 8"),
        (["--seeds", "0"], "--seeds 0 must be at least 1"),
        (["--sample", "9"], "sample=9 must be at most population=8"),
        (["--children", "0"], "children=0 must be"),
        (["--bits", "0"], "--bits 0 must be from 1 to 64"),
        (["--memory-budget", "lots"], "'lots' is not an amount of memory"),
        (["--score", "zen"], "score='zen' is unknown"),
    ],
    "kernel_controlled": [
        *EVERY,
        *TRAINING,
        (["--kernel-sizes", "1", "5"], "--kernel-sizes (1, 5): want 3, the reference, and at least one other"),
        (["--kernel-sizes", "3"], "--kernel-sizes (3,)"),
        (["--kernel-sizes", "3", "4"], "kernel_sizes is (3, 4)"),
        (["--seeds", "2"], "--seeds 2 must be from 3 to 1000"),
        (["--recipe", "magic"], "--recipe 'magic' is unknown; known: snasnet, tuned"),
        (["--bits", "65"], "bits=65 must be a whole number from 1 to 64"),
        (["--parameters", "100"], "kernel size 3: parameters=100 must be at least"),
        (["--parameters", "0"], "--parameters 0 must be from 1 to"),
        (["--cell", "0>3:conv3"], "has no convK"),
        (["--limit-train", "8"], "batch_size = 16 is larger than the data: 8 training images"),
    ],
    "recipe_ablation": [
        *EVERY,
        *TRAINING,
        (["--rows", "nestrov"], "--rows 'nestrov' is unknown; known: sgd, rate-0.05"),
        (["--rows", "sgd"], "--rows 'sgd' is the base or another row again: optimiser=sgd"),
        (["--groups", "colour"], "--groups 'colour' is unknown; known: optimiser, schedule"),
        (["--base-recipe", "magic"], "--recipe 'magic' is unknown; known: snasnet, tuned"),
        (["--precision", "float16"], "precision='float16' is unknown"),
        (["--preset", "cpu-1h"], "--preset 'cpu-1h' is unknown for mnist5k; known: cpu-10min, smoke"),
        (["--preset", "cpu-10min"], "--epochs is not given: --preset cpu-10min trains as long as a time allows"),
        (
            ["--preset", "cpu-10min", "--epochs", "2", "--base-recipe", "tuned"],
            "--preset cpu-10min has a recipe of its own",
        ),
        (["--seeds", "0"], "--seeds 0 must be from 1 to 1000"),
        (["--minutes", "0"], "--minutes 0.0 must be above 0"),
        (["--minutes", "nan"], "--minutes nan must be above 0"),
        (["--time-steps", "0"], "time_steps=0 must be"),
        (["--batch-size", "65"], "batch_size = 65 is larger than the data: 64 training images"),
    ],
}
BASE = {
    "accuracy": ["--preset", "smoke", "--compilation-cache", "off"],
    "beyond_enumeration": "--preset smoke --kernel-set 3 --budget 14 --population 8 --sample 4".split(),
    "kernel_controlled": ["--preset", "smoke"],
    "recipe_ablation": ["--preset", "smoke"],
}


@pytest.mark.parametrize(
    ("script", "options", "words"),
    [(script, *case) for script, cases in CASES.items() for case in cases],
)
def test_bad_input_is_one_line_and_no_folder(script, options, words, tmp_path, capsys):
    line = scripts.refused(
        EXPERIMENTS / f"{script}.py", capsys, *BASE[script], "--out", str(tmp_path / "run"), *options
    )
    assert words in line
    assert not list(tmp_path.iterdir())
