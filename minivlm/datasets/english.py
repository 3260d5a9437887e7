"""Decides whether a caption is English, where its words decide what may be done to its image, and unknown words cannot.

A caption is read as English if all its letters are a to z, at least half of its words are among those that English captions
are made of, and none belongs to another language. This errs on the side of "no": then the image is left as it is.
"""

from __future__ import annotations

import re

from minivlm.datasets.folder_files import TEMPLATES

# Of what English captions consist, without what transforms.py lists.
FREQUENT = """
a an the this that these those and or but nor of with without in on at by to from for into onto over under above below
behind beside between near next around across along through against off out up down inside outside towards toward among
front back side sides middle background foreground is are was were be being been am has have had having do does did can
could will would may it its he she they them his her hers their him i my your you we our us who which what where when
while as if than then there here very some any no not other others another each every all both many several few lots lot
most more much only also just about like such so too one two three four five six seven eight nine ten eleven twelve
dozen hundred first second half pair group bunch couple piece pieces part parts set row rows line lines kind type top
standing stands stand sitting sits sit sat lying lies lie laying lays walking walks walk running runs run riding rides
ride holding holds hold held wearing wears wear looking looks look playing plays play eating eats eat jumping jumps jump
flying flies fly driving drives parked filled covered made taken seen shown showing shows show hanging hangs using used
watching watches talking surrounded attached closed open opened close getting going coming making taking carrying
pulling preparing leaning resting sleeping swimming surfing skiing skating snowboarding climbing smiling posing throwing
catching kicking hitting swinging cutting cooking drinking reaching working waiting grazing traveling travelling
crossing stopped stop topped placed displayed decorated painted lined parking cut sliced cooked baked called named
growing grows man men woman women boy boys girl girls child children kid kids baby babies person people lady guy guys
player players adult adults crowd family friend friends skier surfer skateboarder rider driver dog dogs puppy cat cats
kitten horse horses cow cows sheep bird birds bear bears elephant elephants giraffe giraffes zebra zebras animal animals
fish duck ducks bunny rabbit mouse butterfly insect bee spider snake frog tiger lion monkey goat pig chicken kite kites
flower flowers plant plants petal petals leaf leaves tree trees grass bush bushes forest stamen stigma anther anthers
bud buds stem head face hand hands arm arms leg legs foot feet hair eye eyes ear ears mouth nose tail wing wings body
car cars bus buses truck trucks train trains plane planes airplane airplanes jet boat boats ship motorcycle motorcycles
bike bikes bicycle bicycles van vehicle vehicles traffic street streets road roads highway bridge intersection sidewalk
track tracks station building buildings house houses home church tower clock roof wall walls window windows door doors
room kitchen bathroom bedroom living floor table tables chair chairs couch sofa bed desk bench shelf counter sink toilet
mirror lamp light lights refrigerator oven stove microwave computer laptop keyboard screen television phone remote book
books paper toy toys game ball bat racket tennis baseball soccer football frisbee skateboard surfboard snowboard ski
skis board court field park yard garden beach ocean sea water wave waves river lake pool sand snow mountain mountains
hill rock rocks sky cloud clouds sun sunset moon rain city town country food plate plates bowl bowls cup cups glass
glasses bottle bottles fork knife spoon pizza sandwich cake bread cheese meat vegetables vegetable fruit fruits apple
apples banana bananas broccoli carrots salad soup coffee tea wine beer donut donuts umbrella umbrellas bag bags suitcase
backpack box boxes basket hat shirt shirts jacket coat dress pants shorts shoes suit tie helmet gloves uniform sign
signs pole fence hydrant meter vase photo photos photograph picture pictures image images view scene shot sketch drawing
painting map chart graph area place ground land runway airport storage tank tanks courts golf course farmland desert
shape shapes circle circles square squares triangle triangles star stars cross crosses diamond diamonds heart hearts
ring rings big small large little tiny huge tall short long wide narrow old young new empty full different various same
single double round flat thick thin pale dark bright deep dense wet dry hot cold warm clean dirty busy crowded beautiful
nice pretty cute happy sad male female wooden metal brick stone plastic fluffy furry striped spotted pointed pointy
rounded oval shaped grassy sandy snowy cloudy sunny blurry clear day night time morning evening s t don
"""
# Frequent words of languages in the same letters, which English captions hardly have.
FOREIGN = """
der das und ein eine einem einen einer mit auf im ist von zu dem des le la les une et du aux dans sur avec el los las un
una con por para del al y il lo gli della di che het een de naar em uma com um og ett och til med av en sebuah seorang
yang dan dengan bir ve na je jest
"""
SIDES_ELSEWHERE = re.compile(  # left and right where no accent gives the language away: German, Dutch, French, Spanish, …
    r"\b(links|linker|recht(s|er)|gauche|droite?\b|izquierd|derech|sinistr|destr[aoei]\b|esquer|direit|dreta|venstre|hoyre|hojre|"
    r"lew(o|ej|a|y)\b|praw(o|ej|a|y)\b|vlevo|vpravo|stang|dreapta|kiri\b|kanan|kaliwa|kushoto|kulia|vasen|vasem|oikea|sol\b|sag\b|"
    r"nalevo|lev[oi]\b|lijev|ezker|kreis|vasak|majta|trai\b|phai\b|bal\b|jobb|hidari|migi\b|sleva|sprava)"
)
KNOWN, VETO = frozenset(FREQUENT.split()), frozenset(FOREIGN.split())
FRAMES = [re.compile(re.escape(template.lower()).replace(r"\{\}", "(.+)")) for template in TEMPLATES]


def is_english(caption: str, more: set[str]) -> bool:
    """`more`: further words that count as English. What TEMPLATES say around a class is English, whatever its name."""
    caption = caption.lower().strip()
    words = re.findall("[a-z]+", caption)
    if not caption.isascii() and any(letter.isalpha() and not letter.isascii() for letter in caption):
        return False
    if SIDES_ELSEWHERE.search(caption):
        return False
    if not words or not VETO.isdisjoint(words):
        return False
    known = sum(word in KNOWN or word in more for word in words)
    return 2 * known >= len(words) or any(frame.fullmatch(caption) for frame in FRAMES)
