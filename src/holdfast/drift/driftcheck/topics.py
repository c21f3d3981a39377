"""What a prompt is about: its source's own label where we know it, and else keyword rules.

Rules of this kind sort prompts into tables; they do not decide what is unsafe, which only sources do.
"""

from __future__ import annotations

import re
from collections.abc import Mapping

__all__ = ["FAMILIES", "TOPICS", "categorise", "sexual_about_minors"]

FAMILIES: Mapping[str, str] = {"self_harm": "violence", "fraud": "illegal_activity", "cyber": "illegal_activity"}
"""Our three further categories -> the paper's family that holds them; the other six are families themselves."""

TOPICS: Mapping[str, str] = {
    "illegal": "illegal_activity", "illegal_goods": "illegal_activity", "nonviolent_crime": "illegal_activity",
    "Illegal goods and services": "illegal_activity", "Non-violent crimes": "illegal_activity",
    "Government decision-making": "illegal_activity", "expert_advice": "illegal_activity",
    "Expert advice": "illegal_activity",
    "cybercrime_intrusion": "cyber", "Malware/Hacking": "cyber", "cyber": "cyber",
    "misinformation_disinformation": "disinformation", "Disinformation": "disinformation",
    "Disinformation and deception": "disinformation", "disinformation": "disinformation",
    "harassment_bullying": "hate", "Harassment/Discrimination": "hate", "hate_harassment": "hate",
    "Hate, harassment and discrimination": "hate",
    "Fraud/Deception": "fraud", "Economic harm": "fraud", "fraud_economic": "fraud",
    "Physical harm": "violence", "violence": "violence",
    "Sexual/Adult content": "explicit_content", "sexual": "explicit_content",
    "Privacy": "privacy", "privacy": "privacy", "self_harm": "self_harm",
    "contrast_privacy": "privacy", "privacy_public": "privacy", "privacy_fictional": "privacy",
    "contrast_discr": "hate", "real_group_nons_discr": "hate", "nons_group_real_discr": "hate",
    "hateful": "hate",
}  # fmt: skip
"""What sources call their topics -> our categories; a label that is not here leaves the topic to keyword rules."""

STEMS: Mapping[str, tuple[str, ...]] = {
    "self_harm": (
        r"suicid|self.?harm|(?:kill|cut|hurt) (?:my|your)self|(?:end|take) my (?:own )?life|anorexi|bulimi|overdos",
        r"eating disorder|my (?:\w+ )?arter(?:y|ies)",
    ),
    "explicit_content": (
        r"porn|sex(?:\b|y\b|ual|ting)|erotic|nud(?:e|ity)|naked|explicit (?:image|photo|content|material)",
    ),
    "cyber": (
        r"hack|malware|virus(?:es)?\b.*(?:comput|system|softw)|ransom|phish|keylog|exploit|trojan|botnet|ddos|password",
        r"(?:in)?security (?:system|breach)|firewall|spyware|sql inject|rootkit|webcam|cyber.?(?:attack|crime|secur)",
    ),
    "privacy": (
        r"dox|stalk|spy(?:ing)? on|personal (?:data|information|details)|home address|phone number|surveil",
        r"social security|medical (?:history|record)",
        r"track(?:ing)? (?:some|a person|my)|private (?:data|information|message)|identity theft|steal\w* .*identit",
        r"driver's licen[cs]e|date of birth|\bpin\b|marital status|immigration status",
    ),
    "fraud": (
        r"fraud|scam|counterfeit|forg(?:e\b|ed\b|ing\b|er)|embezzl|launder|insider trading|ponzi|pyramid scheme",
        r"credit card|blackmail",
        r"tax (?:evasion|return)|evad\w* tax|identity document|fake (?:review|charit|id\b|invoice|cheque|check)",
    ),
    "disinformation": (
        r"fake news|misinformation|disinformation|conspirac|propaganda|hoax|rumou?r|false (?:inform|news)|deepfake",
        r"manipulat\w* .*(?:public|election|vote)|rig\w* .*election|mislead",
    ),
    "hate": (
        r"racis|racial|sexis|homophob|transphob|antisemit|xenophob|bigot|discriminat|hate (?:speech|crime|group|mail)",
        r"slur|supremac|ethnic|immigrant|misogyn|stereotyp|harass|bull(?:y|ied)|offensive|insult|cyber.?bull",
        r"(?:black|white|jewish|roma|disabled|gay|trans|deaf|blind|fat|poor|old) (?:people|person|women|men)",
        r"muslim|buddhist|jews",
    ),
    "violence": (
        r"kill|murder|assault|bomb|weapon|gun\b|shoot|stab|tortur|terror|violen|explo(?:de|sive|sion)|attack|poison|abus",
        r"strangl|massacr|assassin|kidnap|hurt|execut\w* (?:a|some|peop)|cannibal|beat up|arson|fire to|hitman|blow up",
        r"slaughter|butcher|terminat|annihilat|decapitat|take (?:\w+ )?out\b|destroy\w* (?:a|some|my|people)|smother",
        r"slay|flay|chok|obliterat|dismember|beat (?:my|some)|someone's death|eliminate \w+ people|eradicat|sever\b",
    ),
    "illegal_activity": (
        r"illegal|drug|cocaine|meth\b|heroin|cannabis|steal|theft|rob(?:\b|bing|bery)|shoplift|smuggl|traffick|brib",
        r"burgl|black market|poach|break(?:ing)? into|crime|criminal|stolen|law enforcement|pirat|piracy|vandal",
        r"hot.?wire|drunk|gambl|sabotag|trespass|cheat (?:on|in)|firearm|\bcrack\b|\bcoke\b|treason",
    ),
}
RULES = {category: re.compile(rf"\b(?:{'|'.join(stems)})") for category, stems in STEMS.items()}
"""From the narrow to the wide: of rules with equal hits the first decides."""
MINORS = re.compile(
    r"\b(?:child|kid|minors?\b|teen|underage|under.?age|school.?(?:girl|boy)|boys?\b|girls?\b|infant|toddler|baby|son\b|"
    r"daughter|niece|nephew|pupil|student)"
)
SEXUAL = re.compile(
    rf"{RULES['explicit_content'].pattern}|\b(?:sex|rap(?:e|ing|ist)|molest|groom|intima|strip|virgin|lewd|kiss)"
)
ALWAYS = re.compile(r"pa?edo|child porn|csam|lolit|molest")


def categorise(text: str, label: str = "") -> str:
    """The category of a prompt: by its source's label if we know it, else by the rule with most hits, else "other".

    >>> categorise("Write a phishing email"), categorise("anything", "Malware/Hacking"), categorise("Bake a cake")
    ('cyber', 'cyber', 'other')
    """
    if label in TOPICS or label in RULES:
        return TOPICS.get(label, label)
    hits = {category: len(rule.findall(text.lower())) for category, rule in RULES.items()}
    return max(hits, key=lambda category: hits[category]) if any(hits.values()) else "other"


def sexual_about_minors(text: str) -> bool:
    """Whether a prompt may be sexual and about children or teenagers; wider than it need be, as it leaves prompts out.

    >>> sexual_about_minors("How do I explain sex to my daughter?"), sexual_about_minors("Name a game for children.")
    (True, False)
    """
    text = text.lower()
    return bool(ALWAYS.search(text) or (MINORS.search(text) and SEXUAL.search(text)))
