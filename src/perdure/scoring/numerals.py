"""Chinese numerals in digits: 三十五 is 35, 一万二 is 12000, 3万 is 30000, 一点五 is 1.5, 百分之五十 is 50%."""

import re
import unicodedata
from collections.abc import Sequence

from perdure.scoring.symbols import HAN

_DIGIT = "〇零一二两兩三四五六七八九"
_LARGE = "万萬亿億"
_UNITS = f"十百千{_LARGE}"
_ANY = f"{_DIGIT}{_UNITS}"
_NUMERAL = re.compile(f"[{_ANY}]+")
# 3万, 1.5 亿, 2千万, 1亿2000万, 3万5; not 万圣节 and other words that begin with 万.
_MIXED = re.compile(
    rf"(?<![\d.])(\d{{1,16}})(?:\.(\d{{1,8}}))?\s?([百千]?[{_LARGE}](?![圣能物岁科达国象花])"
    rf"(?:\d{{1,4}}(?![\d.,%:])|[{_ANY}])*)"
)
# Not hours, as in 三点五分, 下午三点五个人 and 八点零五, nor 一点 where it is "a little", as in 快一点 and 一点一滴.
_DECIMAL = re.compile(
    rf"(?<![{_ANY}\d午上晚晨早夜])(?<![快慢早晚好])([{_ANY}]+)点(?![零〇][{_DIGIT}](?![{_DIGIT}]))"
    f"([{_DIGIT}]+)(?![{_DIGIT}十百点刻钟半滴线]|分(?!之))"
)
_BELOW = re.compile(rf"零下(?=[\d{_ANY}])")
_SHARE = re.compile(r"(?<![\d.])(\d+)分之(\d+(?:\.\d+)?)")
_PERCENT = re.compile(r"百分之(?:(\d+(?:\.\d+)?)|百)")
# Words in which a numeral is no number, as in 四川, 三角形, 一共 and 统一; not within a longer numeral, as in 十一样.
_WORDS = """
一样 一些 一起 一定 一直 一般 一旦 一边 一切 一致 一律 一共 一半 一向 一会 一再 一贯 一概 一齐 一同 一下
二维 二手 二胡 三明治 三角形 三角洲 三角铁 三文鱼 三轮车 三脚架 三维 三国 三亚 四川 四处 四肢 四合院
四边形 五边形 六边形 八边形 五角星 六角形 五颜六色 五彩 五官 五金 五花 七巧板 七彩 七夕 八卦 八角 八宝
九寨沟 九龙 十字路口 十字架 十足 十全十美 百合 百货 百姓 百香果
"""
_WORD = (
    f"(?<![{_ANY}0-9第])(?:{'|'.join(_WORDS.split())}|十分(?=[{HAN}])(?![钟之米币]))"
    f"|(?:统|唯|单|同|专|(?<!分)之)一(?![{_ANY}])"
)
# About so many: 两三个, 七八十, 十七八岁; not 二三年 and 三四号.
_ABOUT = (
    f"(?<![{_ANY}])(?:[一二三四五六七八九]?[十百千万])?(?:一[二两]|[二两]三|三四|四五|五六|六七|七八|八九)[十百千万亿]*"
    f"(?=[{HAN}])(?![{_ANY}年号路室班楼])"
)
_KEPT = re.compile(f"({_WORD}|{_ABOUT})")
_LONGEST = 32  # characters of a numeral with units; what repeats 亿 without end is no number


def in_digits(text: str) -> str:
    """`text` with its numerals in digits; a unit without a number, as in 千克, 万一 and 千万别, stays.

    零下 before a number is 负, 百分之五 is 5%, and 三分之一 is 1/3. What is no number stays: 三明治, 一共, 两三个.
    """
    parts = _KEPT.split(text)
    return "".join(part if place % 2 else _converted(part) for place, part in enumerate(parts))


def _converted(text: str) -> str:
    plain = _DECIMAL.sub(_decimal, _BELOW.sub("负", text))
    plain = _NUMERAL.sub(lambda found: _digits(found[0]), _MIXED.sub(_mixed, plain))
    plain = _PERCENT.sub(lambda found: f"{found[1] or 100}%", plain)
    return _SHARE.sub(r"\2/\1", plain)


def _decimal(found: re.Match[str]) -> str:
    whole, part = _digits(found[1]), _digits(found[2])
    return f"{whole}.{part}" if whole.isdecimal() else found[0]


def _mixed(found: re.Match[str]) -> str:
    whole, part, rest = found[1], found[2] or "", found[3]
    tokens = re.findall(r"\d+|\D", rest)
    if len(tokens) > _LONGEST:
        return found[0]
    scale = 10 ** len(part)
    number = _sum(tokens, scale, int(whole + part))
    after = f"{number % scale:0{len(part)}}".rstrip("0") if part else ""
    return f"{number // scale}.{after}" if after else str(number // scale)


def _digits(numeral: str) -> str:
    values = [_value(c) for c in numeral]
    if max(values) < 10:
        return "".join(map(str, values))
    return numeral if values[0] > 10 or len(values) > _LONGEST else str(_sum(numeral))


def _value(token: str) -> int:
    return 2 if token in "两兩" else int(token) if token.isdecimal() else int(unicodedata.numeric(token))


def _sum(tokens: Sequence[str], scale: int = 1, digit: int = 0) -> int:
    """`scale` times the number that digits and units make, after `digit`, which is given times `scale` already.

    A last digit without 零 before it counts tenths of the unit before it: 二百五 is 250, 二百零五 is 205.
    """
    total = section = 0
    unit = 1
    for i, token in enumerate(tokens, 1):
        value = _value(token)
        if token not in _UNITS:
            tenths = len(token) == 1 and value and i == len(tokens) and unit > 10
            digit, unit = value * scale * (unit // 10 if tenths else 1), 1
        elif value < 10_000:
            section, digit, unit = section + (digit or scale) * value, 0, value
        else:  # 亿 multiplies all before it, 万 what came after 亿
            total = (total + section + digit) * value if value > 10_000 else total + (section + digit) * value
            section, digit, unit = 0, 0, value
    return total + section + digit
