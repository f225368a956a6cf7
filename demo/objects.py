"""Objects of the demo world: those taught to the model, and those held out as concepts.

Every entry is a Unicode CLDR slug as the art packages spell it; `slug=name` gives the noun used in captions where the
slug alone would be a poor one. A held-out entry ends in `:initializer`. The art sets Noto, Twemoji, Fluent 3D and
Fluent flat (`demo.art.REQUIRED_SETS`) hold every object, the others some; `demo.art.Atlas.has` tells which. The emoji
groups of faces, people, symbols and flags are left out entirely; so are drawings of whole scenes, and drawings nearly
the same as that of another object.
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
monkey-face=monkey gorilla dog-face=dog fox raccoon cat-face=cat lion leopard horse donkey unicorn zebra deer
cow-face=cow pig-face=pig ewe=sheep ram camel llama giraffe elephant rhinoceros hippopotamus mouse-face=mouse
rabbit-face=rabbit hedgehog bat bear panda sloth skunk kangaroo chicken rooster baby-chick bird penguin dove eagle
swan owl flamingo peacock parrot frog crocodile turtle lizard snake dragon-face=dragon t-rex whale dolphin seal fish
blowfish shark octopus spiral-shell=shell crab shrimp squid snail butterfly bug ant honeybee=bee beetle spider
scorpion cherry-blossom hibiscus sunflower rose blossom potted-plant evergreen-tree palm-tree cactus
four-leaf-clover=clover maple-leaf mushroom grapes watermelon lemon banana pineapple mango red-apple=apple peach
cherries strawberry kiwi-fruit=kiwi coconut avocado eggplant potato carrot ear-of-corn=corn hot-pepper=chili
bell-pepper cucumber broccoli garlic onion bread croissant pretzel bagel pancakes waffle cheese-wedge=cheese
meat-on-bone=ham poultry-leg=drumstick hamburger french-fries=fries pizza hot-dog sandwich taco egg cooking=fried-egg
popcorn sushi dumpling ice-cream soft-ice-cream cookie birthday-cake chocolate-bar=chocolate candy lollipop honey-pot
hot-beverage=coffee wine-glass cocktail-glass beer-mug bubble-tea bus ambulance police-car automobile=car
sport-utility-vehicle=jeep pickup-truck delivery-truck=truck tractor racing-car motorcycle bicycle skateboard
locomotive tram sailboat motor-boat=boat ship airplane helicopter rocket flying-saucer volcano house church castle
tent mantelpiece-clock=clock watch stopwatch hourglass-done=hourglass umbrella snowman fire jack-o-lantern=pumpkin
christmas-tree balloon wrapped-gift=gift trophy soccer-ball baseball volleyball tennis=tennis-ball
american-football=football boxing-glove kite crystal-ball game-die=die puzzle-piece glasses necktie t-shirt=shirt
jeans dress handbag high-heeled-shoe hiking-boot flat-shoe crown billed-cap=cap graduation-cap ring gem-stone=gem bell
microphone headphone guitar banjo trumpet saxophone drum accordion mobile-phone=phone telephone laptop television
radio magnifying-glass-tilted-left=magnifying-glass candle light-bulb red-paper-lantern=lantern green-book orange-book
closed-book=red-book money-bag package pencil crayon paintbrush scissors key hammer axe bomb shield telescope
microscope chair bed toilet door bathtub bucket soap shopping-cart fire-extinguisher moai orangutan ox
water-buffalo=buffalo mammoth chipmunk=squirrel otter badger paw-prints dodo feather wing goose sauropod=dinosaur
coral spider-web fly worm hyacinth seedling=sprout sheaf-of-rice=wheat nest-with-eggs=nest melon olive
leafy-green=lettuce peanuts=peanut beans chestnut pea-pod baguette-bread=baguette cut-of-meat=steak bacon
bowl-with-spoon=bowl green-salad=salad butter salt=salt-shaker canned-food=tin-can rice-ball cooked-rice=rice
curry-rice=curry steaming-bowl=ramen spaghetti roasted-sweet-potato=sweet-potato fortune-cookie takeout-box shaved-ice
shortcake custard baby-bottle glass-of-milk=milk teacup-without-handle=teacup bottle-with-popping-cork=champagne
tumbler-glass=whiskey cup-with-straw=soda beverage-box=juice-box ice=ice-cube chopsticks
fork-and-knife-with-plate=plate spoon kitchen-knife=knife jar amphora=vase globe-showing-americas=globe world-map=map
compass snow-capped-mountain=mountain umbrella-on-ground=parasol desert-island=island stadium
classical-building=temple building-construction=construction-crane rock wood=log hospital school hotel factory
japanese-castle tokyo-tower=tower fountain carousel-horse=carousel playground-slide=slide ferris-wheel roller-coaster
barber-pole circus-tent bullet-train train metro=subway manual-wheelchair=wheelchair roller-skate oil-drum=barrel
fuel-pump=gas-pump wheel police-car-light=siren vertical-traffic-light=traffic-light stop-sign anchor
ring-buoy=lifebuoy ferry parachute aerial-tramway=cable-car satellite bellhop-bell=desk-bell luggage=suitcase
timer-clock=timer full-moon crescent-moon thermometer sun ringed-planet=planet star cloud cloud-with-rain=rain-cloud
tornado rainbow high-voltage=lightning-bolt snowflake droplet water-wave=wave firecracker party-popper ribbon
admission-tickets=ticket sports-medal=medal flying-disc=frisbee bowling=bowling-pins ice-hockey=hockey-stick
flag-in-hole=golf-flag ice-skate fishing-pole=fishing-rod diving-mask skis sled curling-stone bullseye=target
yo-yo=yoyo water-pistol=water-gun pool-8-ball=pool-ball magic-wand video-game=game-controller joystick
mirror-ball=disco-ball nesting-dolls=nesting-doll heart-suit=heart chess-pawn=pawn artist-palette=palette thread=spool
yarn knot sunglasses goggles coat gloves socks kimono shorts bikini folding-hand-fan=fan purse
shopping-bags=shopping-bag ballet-shoes hair-pick=comb lipstick speaker-low-volume=speaker megaphone postal-horn=horn
musical-note musical-keyboard=piano flute battery electric-plug=plug desktop-computer=computer printer keyboard
floppy-disk optical-disk=compact-disc abacus movie-camera clapper-board=clapperboard camera videocassette=cassette
flashlight notebook scroll newspaper label=price-tag coin credit-card envelope closed-mailbox-with-raised-flag=mailbox
pen briefcase file-folder=folder calendar clipboard pushpin paperclip straight-ruler=ruler wastebasket=trash-can
locked=padlock pick=pickaxe dagger crossed-swords=swords boomerang bow-and-arrow=bow carpentry-saw=saw wrench gear
chains=chain hook toolbox magnet ladder alembic=flask test-tube syringe pill adhesive-bandage=bandage stethoscope
mirror window couch-and-lamp=couch plunger shower razor safety-pin bubbles toothbrush sponge
"""

_HELD_OUT = """
tiger-face=tiger:cat koala:bear wolf:fox hamster:mouse polar-bear:bear boar:pig goat:ram duck:bird lobster:crab
tropical-fish:fish lady-beetle=ladybug:bug tangerine:lemon pear:lemon tomato:apple doughnut=donut:bagel cupcake:cake
pie:cake taxi:car fire-engine:truck motor-scooter:motorcycle speedboat:boat small-airplane=biplane:airplane
house-with-garden=cottage:house deciduous-tree=oak:tree tulip:rose teddy-bear:bear basketball:ball violin:guitar
running-shoe=sneaker:shoe backpack:handbag teapot:coffee top-hat:cap alarm-clock:clock blue-book:book moose:deer
bison:cow poodle:dog beaver:squirrel jellyfish:octopus turkey:rooster lotus:blossom burrito:taco blueberries:grapes
canoe:boat auto-rickshaw=rickshaw:car minibus=van:bus maracas:drum screwdriver:hammer broom:paintbrush basket:bucket
hut:house scarf:necktie military-helmet=helmet:cap thong-sandal=sandal:shoe
"""


def _parse(entry: str) -> WorldObject:
    slug, _, name = entry.partition("=")
    return WorldObject(name=(name or slug).replace("-", " "), slug=slug)


def _parse_held_out(entry: str) -> HeldOutObject:
    head, _, initializer = entry.partition(":")
    return HeldOutObject(object=_parse(head), initializer=initializer)


TRAINING: tuple[WorldObject, ...] = tuple(_parse(entry) for entry in _TRAINING.split())
HELD_OUT: tuple[HeldOutObject, ...] = tuple(_parse_held_out(entry) for entry in _HELD_OUT.split())

UNTINTED = frozenset({"red book", "green book", "orange book"})
"""Names with a colour, which are not tinted: a blue-tinted book would be the held-out "blue book"."""
