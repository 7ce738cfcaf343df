"""What a learner that is taught by hand takes where no method is named."""

from perdure.api.learner import Learner
from perdure.cli.advise import advise
from perdure.reporting.abilities import exportable, searchable
from perdure.reporting.advise import Constraints, shipped
from perdure.training.config import RunConfig
from perdure.training.defaults import LEARNT, for_lessons


def test_it_can_be_exported_and_searched_and_keeps_no_old_images() -> None:
    assert exportable(LEARNT, RunConfig.backbone)
    assert searchable(RunConfig.backbone)
    asked = Constraints(exportable=True, searchable=True, old_data=False)
    for answer in advise(shipped(), asked):
        places = [choice.method for choice in answer.choices]
        assert places.index(LEARNT) < places.index("ncm")


def test_it_is_for_classes_alone() -> None:
    assert Learner.create("tiny()", precision="fp32").config.method == LEARNT
    assert for_lessons("tiny(text=True)", "classify(cosine=True)") == {"method": LEARNT}
    assert for_lessons("tiny(text=True)", "retrieve()") == {}
    assert Learner.create("tiny(text=True)", None, "zeroshot()", precision="fp32").config.method == RunConfig.method
    assert "lora" in for_lessons("tiny_mllm()")["method"]
