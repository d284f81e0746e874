"""Names as slots: what makes copying the only way to get a name right.

The texts' few hundred speakers would be learnt by heart. So `prepare.py` writes a placeholder
character where a person is named, the same one in a dialogue and its summary, and `examples.py`
fills it with another name each time it draws the example. (Hermann et al. 2015, section 2.2,
anonymise entities to the same end.)
"""

import re

import numpy as np

SLOTS = 16  # persons a text can hold, for each gender
FIRST_SLOT = 0xE000  # the first of Unicode's private characters
SLOT = re.compile("( ?)([\ue000-\ue02f])")
SLOT_CHARACTER = re.compile("[\ue000-\ue02f]")
GENDERS = "fmx"  # she, he, not known


def words(text: str) -> list[str]:
    """The words of a list written as running text."""
    return text.split()


FEMALE = words(
    """Ada Adele Agnes Aisha Alice Alina Alma Amara Amelia Amina Amy Ana Andrea Angela Anita
Anja Anna Anya Aoife Ariana Astrid Aurora Ava Ayesha Beatrice Bella Beth Bianca Bridget Camila
Carla Carmen Carol Caroline Catherine Cecilia Celine Chiara Chloe Clara Claire Cleo Daisy Dana
Daria Dawn Deepa Delia Diana Dora Edith Elena Eliza Ella Elsa Emily Emma Esther Eva Eve Fatima
Fiona Freya Gemma Georgia Gina Giulia Grace Greta Hana Hannah Harriet Hazel Heather Helen Heidi
Holly Ida Imani Indira Ines Ingrid Irene Iris Isabel Ivy Jana Jane Jasmine Jenna Jenny Jess
Jessica Jill Jing Joan Joanna Josie Judith Judy Julia June Kamala Karen Kate Kavita Kayla Keiko
Kim Kirsten Lara Laila Layla Leah Lea Leila Lena Leonie Lily Linda Lisa Liv Lola Lotte Louise
Lucia Lucy Luisa Lydia Lynn Mabel Maeve Maggie Maja Mara Margaret Maria Marie Marina Marta
Martha Mary Matilda Maya Megan Mei Meera Mia Michelle Mina Mira Miriam Molly Mona Monica Nadia
Naomi Natalie Nicole Nina Noor Nora Oksana Olga Olivia Paige Pam Paula Penny Petra Phoebe Pia
Polly Priya Rachel Rania Rebecca Renata Rita Rosa Rose Ruby Ruth Sabine Sally Salma Samira
Sandra Sara Sarah Selin Shirin Signe Silvia Sofia Sonia Sophie Stella Sue Sunita Susan Svetlana
Tamara Tanya Tara Tessa Tina Tova Ulrike Uma Ursula Valeria Vera Veronica Victoria Viola Wanda
Wendy Willa Xenia Yara Yasmin Yoko Yuki Yvonne Zahra Zainab Zara Zoe Zofia"""
)

MALE = words(
    """Aaron Abdul Abel Adam Adrian Ahmed Alan Albert Alec Alejandro Alex Ali Amir Anders Andre
Andrew Andy Anton Antonio Ari Arjun Arthur Axel Bart Ben Bernard Bilal Bill Bjorn Bob Boris Brad
Brian Bruno Bruce Callum Carl Carlos Charlie Chen Chris Cole Colin Conor Craig Dan Daniel Dave
David Dean Dennis Derek Diego Dimitri Dominic Don Dylan Eddie Edgar Edwin Elias Eli Emil Enzo
Eric Erik Ethan Evan Fabian Felix Femi Finn Francis Frank Franz Fred Gabriel Gary Gavin George
Gerald Giovanni Glen Graham Greg Gustav Guy Hamza Hans Harold Harry Harvey Hassan Henrik Henry
Hiro Hugo Ian Ibrahim Igor Imran Isaac Ivan Jack Jackson Jacob Jake Jakob Jamal James Jan Jason
Javier Jeff Jerome Jim Joe Joel John Jonas Jonathan Jorge Jose Josh Juan Julian Kai Karim Karl
Keith Ken Kenji Kevin Kofi Kumar Kurt Kwame Lars Laurent Leo Leon Liam Logan Lorenz Louis Luca
Lucas Luis Luke Malik Manuel Marc Marco Marcus Mario Mark Martin Mateo Matthew Max Mehmet
Michael Miguel Mike Milan Milo Mohamed Nabil Nate Nathan Neil Nick Nico Nigel Nils Noah Noel
Oliver Ollie Omar Oscar Otto Owen Pablo Paolo Patrick Paul Pavel Pedro Peter Phil Pierre Piotr
Rafael Rahul Raj Ralf Ravi Ray Raymond Reza Richard Rob Robert Robin Roger Roland Roman Ron Rory
Ross Roy Rudi Russell Ryan Said Sam Sanjay Scott Sean Sebastian Sergei Seth Simon Stan Stefan
Steve Stuart Sven Tariq Ted Theo Thomas Tim Tobias Toby Todd Tom Tomas Tony Trevor Tristan Tyler
Umar Victor Viktor Vincent Vlad Walter Wayne Wei Will William Xavier Yan Yusuf Zack Zane"""
)

ONSETS = words(
    """b br c ch d dr f fr g gr h j k kh kl l m n p pr qu r rh s sh sl st sv t th tr v w y z zh
sz"""
)
CORES = words("a a a e e e i i i o o u ai au ei ie io ou ee oo ya aa")
CODAS = ["", "", "", *words("n r l s m t k d nd rt sh v ng ck ssa lla nne")]
ENDINGS = {"f": words("a a ia e i ine ette ah ya"), "m": words("o us en ek an in or ar ik esh")}


def invent(gender: str, count: int, rng: np.random.Generator) -> list[str]:
    """Names that nobody bears: no list is long enough to teach copying letter by letter."""
    found: list[str] = []
    for _ in range(count):
        parts = []
        for _ in range(1 if gender in ENDINGS else int(rng.integers(1, 3))):
            parts += [str(rng.choice(ONSETS)), str(rng.choice(CORES)), str(rng.choice(CODAS))]
        ending = str(rng.choice(ENDINGS.get(gender, CODAS)))
        onset = str(rng.choice(ONSETS)) if gender in ENDINGS else ""
        found.append("".join([*parts, onset, ending]).capitalize())
    return found


def blend(known: list[str], count: int, rng: np.random.Generator) -> list[str]:
    """Names that begin as known ones do, so that a name's first token does not tell the others."""
    found: list[str] = []
    for _ in range(count):
        name = str(rng.choice(known))
        stem = name[: int(rng.integers(2, len(name) + 1))]
        found.append(stem + "".join(str(rng.choice(p)) for p in (ONSETS, CORES, CODAS)))
    return found


def slot(gender: str, person: int) -> str:
    """The placeholder of one person."""
    return chr(FIRST_SLOT + GENDERS.index(gender) * SLOTS + person)
