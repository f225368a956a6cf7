from __future__ import annotations

from pipeline.report.remarks import grouped


def test_causes_are_counted_and_few_remarks_stay_whole() -> None:
    notes = [(f"c{i}", f"initializer 'word{i % 16}' is spelled out in {i} tokens") for i in range(156)]
    odd = [
        ("", "no initializer"),
        ("a", "2 prompts have its placeholder '<a>'"),
        ("b", "1 prompts have its placeholder '<b>'"),
    ]
    assert list(grouped([*notes, *odd], 3)) == [
        "156 times (c0, c1, c2 and 153 more), the first: initializer 'word0' is spelled out in 0 tokens"
        "; also 'word1', 'word2', 'word3', 'word4', 'word5', 'word6', 'word7', 'word8', 'word9', 'word10', 'word11', "
        "'word12' and 3 more",
        "no initializer",
        "a: 2 prompts have its placeholder '<a>'",
        "b: 1 prompts have its placeholder '<b>'",
    ]
