"""How the suite is shared between two processes: in parts, those that take longest first, so that none is left last."""

from xdist.scheduler import LoadScopeScheduling

RECIPES = "tests/test_recipes.py"
# what takes longer than ten seconds, by how long; a file that is not among them is only begun later
LONGEST = (
    "tests/test_hosts.py",
    RECIPES,
    "tests/test_engines.py",
    "tests/test_readme.py",
    "tests/test_generative_page.py",
    "tests/test_planning_page.py",
    "tests/callbacks/test_preemption.py",
    "tests/planner",
    "tests/test_resume.py",
    "tests/test_vision_page.py",
    "tests/test_export_formats.py",
    "tests/test_elastic.py",
    "tests/strategies",
    "tests/test_batch_size.py",
    "tests/modules",
    "tests/callbacks",
    "tests/test_optim_8bit.py",
)


def part_of(nodeid):
    """Return the part that a test belongs to, whose tests one process runs: its file, and of recipes one recipe."""
    file, _, test = nodeid.partition("::")
    name = test.partition("[")[2]
    return f"{file}[{name}" if file == RECIPES and name else file


def place_of(nodeid):
    """Return where a test's part stands among those that begin early."""
    part = part_of(nodeid)
    if part == RECIPES:
        return len(LONGEST)  # its tests look at what all recipes have left behind, and one takes ten seconds
    return next((place for place, start in enumerate(LONGEST) if part.startswith(start)), len(LONGEST) + 1)


class Sharing(LoadScopeScheduling):
    """Gives a process that has nothing left to do the next part."""

    def __init__(self, config, log=None):
        # in the order of `place_of`, and not by the number of tests
        config.option.loadscopereorder = False
        super().__init__(config, log)

    def _split_scope(self, nodeid):
        return part_of(nodeid)
