import pytest

import fuzzing

CASES = 350
"""Of each reader; 5,250 in all. The slow run has 20,000 of each."""


@pytest.mark.parametrize("name", ["study", "model", "user"])
@pytest.mark.parametrize("cases", [CASES, pytest.param(20_000, marks=pytest.mark.slow)])
def test_what_is_damaged_is_refused_in_one_line_or_read_at_once(tmp_path, name, cases):
    made = {"study": fuzzing._study_files, "user": fuzzing._user_files}
    targets = fuzzing._model_files(tmp_path / "model") if name == "model" else made[name](tmp_path)
    for reader, target in targets.items():
        found = fuzzing.campaign(target, cases, seed=1)
        assert (found["foreign"], found["silent"], found["slow"], found["errors"]) == (0, 0, 0, []), (reader, found)
        assert found["refused"] > cases / 5 or reader in ("salvage", "t.txt"), (reader, found)
    assert {path.name for path in tmp_path.iterdir()} <= {target.path.name for target in targets.values()} | {
        "model", "samples-wal", "samples-shm"
    }  # fmt: skip
