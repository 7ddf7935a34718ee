from tests.fuzz_readers import fuzz


def test_a_moment_of_fuzzing_finds_nothing():
    outcomes = fuzz(seconds=3, seed=1)
    files = {
        "pack",
        "low-rank pack",
        "checkpoint",
        "gguf",
        "gguf model",
        "onnx columns",
        "onnx blocks",
        "index",
        "ledger",
        "forged ledger",
        "undo",
    }
    assert set(outcomes) == files | {"damaged journal", "forged journal"}
    assert outcomes["pack"]["accepted"] == 0 or outcomes["pack"]["accepted"] < outcomes["pack"].total() / 10
    assert all(count.total() > 10 for count in outcomes.values())
    assert not any("an error without advice" in count for count in outcomes.values())
