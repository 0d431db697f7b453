from tests import layout_table

tool = layout_table.load()


def test_the_table_in_the_document_is_current():
    text = tool.FILE.read_text(encoding="utf-8")
    assert tool.document(text) == text, f"rules or flags have changed; run `{tool.COMMAND}`"


def test_a_rule_that_refuses_a_pair_is_quoted_by_its_number():
    table = tool.build_table()
    number = int(table.cells["ZeRO 3", "pipeline"])
    assert table.sentences[number - 1].startswith("--zero-stage 3 with --pipeline-model-parallel-size 2")
    assert table.cells["pipeline", "Ulysses"] == "yes"
    assert table.cells["ZeRO 3", "ZeRO 2"] == "-"


def test_what_a_pair_leaves_open_is_chosen_such_that_it_works():
    assert tool.fewest_refusals(tool.FEATURES["ZeRO 0"]) == []
    assert tool.fewest_refusals(tool.FEATURES["weights on host"]) == []
    assert tool.refusals(tool.FEATURES["weights on host"]) != []
