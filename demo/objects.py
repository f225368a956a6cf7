"""Objects of the demo world: those taught to the model, and those held out as concepts.

Every entry is a Unicode CLDR slug as the art packages spell it; `slug=name` gives the noun used in captions where the
slug alone would be a poor one; a star marks the core objects. The emoji groups of faces, people, symbols and flags are
left out entirely.
"""

from __future__ import annotations

from dataclasses import dataclass

EXCLUDED_GROUPS = ("Smileys & Emotion", "People & Body", "Symbols", "Flags")


@dataclass(frozen=True, slots=True)
class WorldObject:
    """Object that can be drawn."""

    name: str
    """Noun in captions, for example "polar bear"."""
    slug: str
    """CLDR slug with hyphens, the key of the art packages."""


@dataclass(frozen=True, slots=True)
class HeldOutObject:
    """Object that the model never sees: a concept to learn."""

    object: WorldObject
    initializer: str
    """Known word near the object, the initializer of its inversion."""

    @property
    def concept_id(self) -> str:
        """Name with hyphens, safe in a path."""
        return self.object.name.replace(" ", "-")


_TRAINING = """
monkey-face=monkey* gorilla dog-face=dog* fox* raccoon cat-face=cat* lion* leopard* horse* donkey unicorn zebra* deer
cow-face=cow* pig-face=pig* ewe=sheep* ram camel llama giraffe* elephant* rhinoceros hippopotamus mouse-face=mouse*
rabbit-face=rabbit* hedgehog bat bear* panda* sloth skunk kangaroo chicken* rooster* baby-chick* bird* penguin* dove
eagle swan owl* flamingo* peacock parrot frog* crocodile turtle* lizard snake* dragon-face=dragon* t-rex whale*
dolphin* seal fish* blowfish shark* octopus* spiral-shell crab* shrimp squid snail* butterfly* bug ant honeybee=bee*
beetle* spider* scorpion cherry-blossom hibiscus sunflower* rose* blossom potted-plant evergreen-tree* palm-tree*
cactus* four-leaf-clover=clover maple-leaf mushroom* grapes* watermelon* lemon* banana* pineapple* mango
red-apple=apple* peach* cherries* strawberry* kiwi-fruit coconut avocado* eggplant potato carrot* ear-of-corn=corn*
hot-pepper=chili bell-pepper cucumber broccoli garlic onion bread* croissant* pretzel* bagel* pancakes* waffle
cheese-wedge=cheese* meat-on-bone poultry-leg hamburger* french-fries=fries* pizza* hot-dog* sandwich taco egg
cooking=fried-egg* popcorn sushi dumpling ice-cream* soft-ice-cream cookie* birthday-cake* chocolate-bar=chocolate
candy lollipop* honey-pot hot-beverage=coffee* wine-glass cocktail-glass beer-mug bubble-tea bus* ambulance*
police-car* automobile=car* sport-utility-vehicle=jeep* pickup-truck delivery-truck=truck* tractor racing-car
motorcycle* bicycle* skateboard locomotive tram sailboat* motor-boat=boat ship* airplane* helicopter* rocket*
flying-saucer volcano* house* church castle* tent mantelpiece-clock=clock* watch stopwatch hourglass-done=hourglass
umbrella* snowman* fire jack-o-lantern=pumpkin* christmas-tree* balloon* wrapped-gift=gift* trophy soccer-ball*
baseball volleyball tennis=tennis-ball* american-football=football* boxing-glove kite crystal-ball game-die=die
puzzle-piece glasses necktie t-shirt=shirt* jeans dress handbag* high-heeled-shoe hiking-boot* flat-shoe* crown*
billed-cap=cap* graduation-cap ring gem-stone=gem bell* microphone headphone guitar* banjo trumpet* saxophone drum*
accordion mobile-phone=phone* telephone laptop television* radio magnifying-glass-tilted-left=magnifying-glass candle*
light-bulb* red-paper-lantern=lantern green-book* orange-book closed-book=red-book* money-bag package pencil* crayon
paintbrush scissors key* hammer* axe bomb* shield telescope microscope chair* bed toilet door bathtub bucket soap
shopping-cart fire-extinguisher moai
"""

_HELD_OUT = """
tiger-face=tiger:cat koala:bear wolf:fox hamster:mouse polar-bear:bear boar:pig goat:ram duck:bird lobster:crab
tropical-fish:fish lady-beetle=ladybug:bug spouting-whale:whale tangerine:lemon pear:lemon tomato:apple
doughnut=donut:bagel cupcake:cake pie:cake taxi:car fire-engine:truck motor-scooter:motorcycle speedboat:boat
small-airplane=biplane:airplane house-with-garden=cottage:house deciduous-tree=oak:tree tulip:rose teddy-bear:bear
basketball:ball violin:guitar running-shoe=sneaker:shoe backpack:handbag teapot:coffee top-hat:cap alarm-clock:clock
blue-book:book
"""


def _parse(entry: str) -> WorldObject:
    slug, _, name = entry.partition("=")
    return WorldObject(name=(name or slug).replace("-", " "), slug=slug)


def _parse_held_out(entry: str) -> HeldOutObject:
    head, _, initializer = entry.partition(":")
    return HeldOutObject(object=_parse(head), initializer=initializer)


TRAINING: tuple[WorldObject, ...] = tuple(_parse(entry.rstrip("*")) for entry in _TRAINING.split())
CORE: tuple[WorldObject, ...] = tuple(_parse(entry[:-1]) for entry in _TRAINING.split() if entry.endswith("*"))
"""Objects taught to the denoiser within a CPU's budget: half the names, twice the pictures of each. The autoencoder,
the tokenizer and the CLIP learn all of `TRAINING`; so may a denoiser that has a GPU (`--objects all`)."""
HELD_OUT: tuple[HeldOutObject, ...] = tuple(_parse_held_out(entry) for entry in _HELD_OUT.split())

UNTINTED = frozenset({"red book", "green book", "orange book"})
"""Names with a colour, which are not tinted: a blue-tinted book would be the held-out "blue book"."""
