"""Words and characters that the tokeniser of captions knows (ptb_rules.py), as the official program was found to know them."""

# Their full stop belongs to them: titles and the like, and those that may end a sentence.
ABBREVIATIONS = """
    adj adm adv alex assoc asst atty attys ave brig capt cf cie cmdr col comdr cpl dept det dr drs elec ens ft gen gov govs
    hon insp invt jos lieut lt maj messrs mlle mme mr mrs ms msgr mt natl pfc ph pres prof profs pvt rep reps rev sen sens
    sfc sgt spc st ste supt supts treas vs wm
"""
FINAL_ABBREVIATIONS = """
    al ala apr ariz assn aug bhd bldg blvd bros calif co colo conn corp cos ct dak dec esq est etc ext feb fla fri ga inc
    ind intl jan jr jul jun kan kans ky ltd mar md mich minn mo mon mont neb nev nov oct okla penn plc rd rt sep sept seq sq
    sr sys tel tenn thu thurs tue tues univ va vt wed wis wisc wyo
"""
NOT_IN_CAPITALS = "mfg mtg ppte pptes ppty pptys pte ptes pty ptys"
CAPITAL_ABBREVIATIONS = "ark az del ill la mass miss ore pa tex wash"  # small they are words
BEFORE_NUMBERS = "art ca fig figs no nos op pp prop"
# A letter and a full stop before one of these end a sentence.
STARTERS = """
    a about according additionally after an as at but earlier he her here however if in it last many more now once one other our
    she since so some such that the their then there these they this we what when while yet you mr\\. ms\\.
"""
SPLIT = "can|not gon|na wan|na got|ta lem|me gim|me more|'n"
WITH_APOSTROPHE = r"nor'easter c'mon e'er s'mores ev'ry li'l nat'l cap'n cont'd\."
EXTENSIONS = """
    c h x gz pl ps py bat bmp cgi cpp dll doc exe gif htm jar jpg mov pdf php png ppt sql tar txt wav xml zip docx html java
    jpeg
"""
# How signs are written. The last ones are left out.
SIGNS = """
    (=-lrb- )=-rrb- [=-lsb- ]=-rsb- {=-lcb- }=-rcb- ½=1/2 ¼=1/4 ¾=3/4 ⅓=1/3 ⅔=2/3 £=# €=$ ¤=$ ₠=$ \x80=$ ¢=cents …=...
    –=-- —=-- ―=-- \x96=-- \x97=-- &mdash;=-- &ndash;=-- &amp;=& &lt;=< &gt;=> &quot;='' &apos;=' &nbsp;= ‐= ‑=
"""
# Characters, by their numbers: of the basic plane, beyond ASCII. Marks are parts of words; symbols are tokens.
MARKS = """
    ad 2c2-2c5 2d2-2df 2e5-2eb 2ed 2ef-36f 375 378-379 384-385 3f6 483-487 55a-55f 58a 591-5bd 5bf 5c1-5c2 5c4-5c5 5c7 615-61a
    64b-65e 670 6d6-6e4 6e7-6ed 6fd-6fe 70f 711 730-74c 7a6-7b0 7eb-7f3 900-903 93c 93e-94e 951-955 962-963 981-983 9bc 9be-9c4
    9c7-9c8 9cb-9cd 9d7 9e2-9e3 a01-a03 a3c a3e-a4f a81-a83 abc abe-acf b82 bbe-bc2 bc6-bc8 bca-bcd c01-c03 c3e-c56 d3e-d44
    d46-d48 e31 e34-e3a e47-e4e eb1 eb4-ebc ec8-ecd 1885-1886
"""
SYMBOLS = """
    a1 a5-a9 ac ae-b4 b6-b9 bf d7 f7 37e 387 589 5be 5c0 5c3 5c6 5f3-5f4 600-603 606-60c 614 61b 61e-61f 66a 66d 6d4 700-70d
    7f6-7f8 964-965 e3f e4f 1fbd 2016-2017 201a 201e-2023 2030-2038 203b 203e-2042 2044 2070 2074-207e 2080-208e 20a4 2100-2101
    2103-2106 2108-2109 2114 2116-2118 211e-2123 2125 2127 2129 212e 213a-213b 2140-2144 214a-214d 214f 2155-215e 2190-2bff
    3001-3002 3012 30fb ff01-ff0f ff1a-ff20 ff3b-ff40 ff5b-ff65 ffe0-ffe1 ffe5-ffe6
"""
