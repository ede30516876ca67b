import pytest

from ppf.printing import print_recovered

FIGURES = {"ppl": 30.0, "interval": [29.0, 31.0], "log_ppl": 3.4}
RECORD = {
    "dense": {**FIGURES, "log_ppl": 3.2}, "before": FIGURES, "after": FIGURES, "share": 0.1, "rank": 8, "tokens": 256,
    "protocol": {"text": "pydocs", "tokens": 512, "seq_len": 128, "dtype": "float32"}, "text": "pydocs", "distinct_tokens": 512,
    "steps": 1, "lr": 1e-3, "seconds": 1.0, "teacher": None, "params": 10, "bytes": 20, "out": "better",
}  # fmt: skip


@pytest.mark.parametrize(
    ("interval", "warned"), [([0.01, 0.03], ""), ([-0.01, 0.03], "no gain can be told"), ([-0.03, -0.01], "made the model worse")]
)
def test_training_that_gained_nothing_is_warned_of(capsys, interval, warned):
    print_recovered({**RECORD, "gain": {"log_ppl": sum(interval) / 2, "interval": interval}})
    out, err = capsys.readouterr()
    assert "256 tokens, drawn from 512 of pydocs" in out
    assert warned in err and bool(err) == bool(warned)
