"""Rewards that misbehave on demand: a worker process must be able to import them, so they live in a module."""

import os
import time

from r1fast.rewards import Reward, lane, register


@register("misbehaving")
class Misbehaving(Reward):
    """Does what the completion says; otherwise the share of the reference in it."""

    cheap = False

    def judge(self, completion, reference):
        match completion.split():
            case ["sleep", seconds]:
                time.sleep(float(seconds))
            case ["die"]:
                os._exit(3)
            case ["abort"]:
                os.abort()
            case ["raise"]:
                raise RuntimeError("as asked")
            case ["print"]:
                print('{"value": 1.0, "error": null}', flush=True)
                return 0.25
            case ["pid"]:
                return float(os.getpid())
            case ["memory"]:
                return float(len(bytearray(8 << 30)))
            case ["length"]:
                return float(len(reference))
        return 0.5


@register("unloadable")
class Unloadable(Reward):
    cheap = False

    def prepare(self):
        import no_such_module_anywhere  # noqa: F401


@register("failing")
class Failing(Reward):
    """Cheap; fails on "?" and otherwise reads the completion as its value."""

    def judge(self, completion, reference):
        return float(completion)


@register("courteous")
class Courteous(Reward):
    """Does what the words of the completion say, one after the other; its value is the time at which it was done."""

    cheap, makes_way = False, True

    def judge(self, completion, reference):
        place = lane.current.get()
        for word in completion.split():
            match word.partition(":")[::2]:
                case "park", resident:
                    place.park(int(resident or 0))
                case "leave", resident:
                    place.leave(int(resident or 0))
                case "hold", _:
                    lane.hold()
                case "sleep", seconds:
                    time.sleep(float(seconds))
                case "die", _:
                    os._exit(3)
        return time.monotonic()
