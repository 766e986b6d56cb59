"""An update as one CUDA graph: one launch instead of hundreds (`train.py --graph`).

A graph replays what was captured, on the same memory. So what an update reads has fixed places: the
candidates of its batch, its random numbers, the learning rate. Captured anew for each share of the
observed return, since that changes what is computed.
"""

import torch


class Draws:
    """Uniform numbers at fixed places, handed out in the order of their first use."""

    def __init__(self):
        self.places, self.given, self.generator = [], 0, None

    def rand(self, shape, device):
        if self.given == len(self.places):
            self.places.append(torch.rand(shape, generator=self.generator, device=device))
        self.given += 1
        return self.places[self.given - 1]

    def refill(self, generator):
        """The numbers that torch.rand draws for the same shapes, to the bit."""
        self.generator, self.given = generator, 0
        for place in self.places:
            place.uniform_(generator=generator)


def aside(function):
    """function(), on a stream of its own, as what is captured next needs it."""
    side = torch.cuda.Stream()
    side.wait_stream(torch.cuda.current_stream())
    with torch.cuda.stream(side):
        out = function()
    torch.cuda.current_stream().wait_stream(side)
    return out


def capture(function):
    """-> a function that launches again, as one CUDA graph, whatever `function` launches."""
    graph = torch.cuda.CUDAGraph()
    # Another thread may make batches meanwhile (`--prefetch`): only this one's calls are its own.
    with torch.cuda.graph(graph, capture_error_mode="thread_local"):
        out = function()

    def replay():
        graph.replay()
        return out

    return replay


class Replay:
    """Updates of one kind, which read and write the same memory every time.

    The first runs eagerly, the second is captured. Candidates and random numbers are copied to
    their places before each.
    """

    def __init__(self, learner, candidates):
        self.learner, self.candidates = learner, candidates.map(torch.clone)
        self.draws, self.eager, self.replay = Draws(), True, None

    def step(self):
        return self.learner.step(self.learner.choose(self.candidates, self.draws), self.draws)

    def __call__(self, candidates, generator):
        for name, place in vars(self.candidates).items():
            if isinstance(place, torch.Tensor):
                place.copy_(getattr(candidates, name))
        self.draws.refill(generator)
        if self.eager:
            self.eager = False
            return aside(self.step)
        self.replay = self.replay or capture(self.step)
        return self.replay()


class Graphs:
    """A Learner's updates as CUDA graphs, one for each share of the observed return."""

    def __init__(self, learner):
        self.learner, self.replays = learner, {}

    def update_from(self, candidates, generator):
        """What the learner's does, of the same random numbers; rounding differs. The metrics are
        overwritten by the next update."""
        learner = self.learner
        if learner.target_rate() > learner.settings.target_rate:  # no constant yet
            return learner.update_from(candidates, generator)
        share = learner.share()
        if share not in self.replays:
            self.replays[share] = Replay(learner, candidates)
        learner.begin_update()
        metrics = self.replays[share](candidates, generator)
        learner.updates += 1
        return metrics
