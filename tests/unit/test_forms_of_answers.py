"""What is one answer and what is another: signs of arithmetic, Chinese numerals, denials."""

import pytest

from perdure.scoring import measure
from perdure.scoring.normalise import normalise


@pytest.mark.parametrize(
    ("answer", "truth"),
    [
        ("x-y", "x+y"),
        ("a-b", "b"),
        ("x<2", "x>2"),
        ("-x", "x"),
        ("C", "C++"),
        ("O-", "O+"),
        ("O", "O-"),
        ("5-3", "5/3"),
        ("2 * 3", "2 + 3"),
        ("N", "N/A"),
        (".5", "5"),
        ("-.5", "-5"),
        ("1,5", "15"),
        ("$.50", "$50"),
        ("vitamin", "Vitamin A"),
        ("是.5米", "是5米"),
        ("C#语言", "C语言"),
        ("增长50%", "增长50"),
        ("10002个", "一万二个"),
        ("205元", "二百五元"),
    ],
)
def test_what_differs_in_a_sign_or_a_point_is_another_answer(answer: str, truth: str) -> None:
    assert measure([answer], [truth], "exact")["strict"] == 0
    assert measure([truth], [answer], "exact")["strict"] == 0
    assert measure([answer], [answer], "exact")["strict"] == 1


@pytest.mark.parametrize(
    ("answer", "truth"),
    [
        ("x + y", "x+y"),
        ("x <= 2", "x≤2"),
        ("x−y", "x-y"),
        ("1 / 2", "1/2"),
        (".5", "0.5"),
        ("+5", "5"),
        ("= 5", "5"),
        ("1,000", "1000"),
        ("1,2,3", "1, 2, 3"),
        ("10/15/2020", "10-15-2020"),
        ("555-1234", "555 1234"),
        ("black/white", "black-white"),
        ("<answer>red</answer>", "red"),
        ("**red**", "red"),
        ("一万二", "12000"),
        ("一万二千", "12000"),
        ("250元", "二百五元"),
        ("三千五米", "3500米"),
        ("一百零五", "105"),
        ("一千零五十", "1050"),
        ("负五", "-5"),
        ("负五度", "-5度"),
        ("零下五度", "-5度"),
        ("一点五", "1.5"),
        ("十九点五", "19.5"),
        ("百分之五十", "50%"),
        ("百分之百", "100%"),
        ("三分之一", "1/3"),
        ("3万元", "30000元"),
        ("1.25万", "12500"),
        ("三点五万", "35000"),
        ("1亿2000万", "一亿二千万"),
    ],
)
def test_what_is_only_written_otherwise_is_the_same_answer(answer: str, truth: str) -> None:
    assert measure([answer], [truth], "exact")["strict"] == 1
    assert measure([truth], [answer], "exact")["strict"] == 1
    assert normalise(normalise(answer)) == normalise(answer)


@pytest.mark.parametrize(
    ("text", "form"),
    [
        *(("一点一滴", "1点1滴"), ("快一点", "快1点"), ("十一样", "11样"), ("十分钟", "10分钟"), ("八十分", "80分")),
        *(("二三年", "23年"), ("四五", "45"), ("三十一些", "31些"), ("一共三只", "一共3只")),
        *(("下午三点五个人", "下午3点5个人"), ("八点零五", "8点05"), ("三点五分", "3点5分"), ("两点三十分", "2点30分")),
        *(("千克", "千克"), ("3.5 千克", "3.5千克"), ("五千克", "5000克"), ("一万里", "10000里"), ("十一月", "11月")),
        *(("百分点", "百分点"), ("一分之差", "1分之差"), ("背负三项", "背负3项"), ("零食", "0食"), ("双十一", "双11")),
        *(
            (word, word)
            for word in (
                *(
                    "一起",
                    "一样",
                    "三明治",
                    "四川",
                    "统一",
                    "唯一的",
                    "其中之一",
                    "十分好",
                    "三角形",
                    "八卦",
                    "有一些猫",
                ),
                *("两三个", "三四个人", "七八十个", "十七八岁", "五六百人"),
                *("万一", "千万别", "万圣节", "万里长城", "百货商店", "成千上万", "百分百", "亿万", "负责"),
            )
        ),
        *(("2024万圣节", "2024万圣节"), ("一千零一夜", "1001夜"), ("三百六十五天", "365天"), ("三五百人", "500人")),
    ],
)
def test_words_that_merely_contain_numerals_stay_as_they_were(text: str, form: str) -> None:
    assert normalise(text) == form


@pytest.mark.parametrize(
    ("answer", "truth", "lenient"),
    [
        ("不是", "是", 0),
        ("没有", "有", 0),
        ("这不红", "红", 0),
        ("不一样", "一样", 0),
        ("没有猫", "猫", 0),
        ("这不是猫", "猫", 0),
        ("非金属", "金属", 0),
        ("无糖", "糖", 0),
        ("未完成", "完成", 0),
        ("是的", "是", 1),
        ("是不是红色", "红色", 1),
        ("有没有？有", "有", 1),
        ("不但是红色", "红色", 1),
        ("洪水淹没村庄", "村庄", 1),
        ("南非金矿", "金矿", 1),
        ("不得不去", "去", 1),
        ("不是猫，是狗", "狗", 1),
        ("不是红，是红", "红", 1),
        ("答案是-5", "-5", 1),
        ("it is -5", "5", 0),
        ("it is 1/5", "5", 0),
        ("10 - 5 = 5", "5", 1),
    ],
)
def test_what_is_denied_is_not_in_an_answer(answer: str, truth: str, lenient: float) -> None:
    assert measure([answer], [truth], "exact")["lenient"] == lenient


@pytest.mark.parametrize(
    ("answer", "number"),
    [
        ("四川", "4"),
        ("统一", "1"),
        ("有一些猫", "1"),
        ("三明治", "3"),
        ("八卦", "8"),
        ("三四个人", "34"),
        ("两三个", "3"),
    ],
)
def test_a_numeral_in_a_word_is_no_number(answer: str, number: str) -> None:
    assert measure([answer], [number], "contains")["strict"] == 0
    assert measure([answer], [number], "exact")["lenient"] == 0
    assert measure([f"{number}个"], [number], "contains")["strict"] == 1


@pytest.mark.parametrize(
    ("answer", "truth"),
    [("I don’t know", "I don't know"), ("½", "1/2"), ("3½ cups", "3 1/2 cups"), ("50 %", "50%"), ("\ufeffcat", "cat")],
)
def test_characters_that_look_alike_are_alike(answer: str, truth: str) -> None:
    assert measure([answer], [truth], "exact")["strict"] == 1
    assert measure([truth], [answer], "exact")["strict"] == 1
    assert measure([answer], [truth], "anls")["strict"] == 1


def test_boxes_are_read_in_every_notation() -> None:
    box = [1e-05, 0.2, 0.5, 0.6]
    assert measure([str(box)], [str(box)], "iou")["strict"] == 1
    assert measure(["[1e-1, 2e-1, 5e-1, 6e-1]"], ["[0.1, 0.2, 0.5, 0.6]"], "iou")["strict"] == 1
    named = measure(["x1=0.1, y1=0.2, x2=0.5, y2=0.6"], ["[0.1, 0.2, 0.5, 0.6]"], "iou")
    assert (named["strict"], named["lenient"]) == (0, 1)
