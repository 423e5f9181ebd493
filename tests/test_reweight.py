"""Learning to reweight: gradients against oracles, weights, data, and the run at tiny size."""

import copy
import gzip
import json
import struct
import sys
from pathlib import Path

import pytest
import torch
from torch.nn import functional


pytest.importorskip("rich")
pytest.importorskip("sklearn")
pytest.importorskip("matplotlib")
numpy = pytest.importorskip("numpy")

pytestmark = pytest.mark.usefixtures("examples_on_path")

TINY = ["--threads", "1", "--seeds", "2", "--steps", "12", "--batch", "20"]
TWO = ["--methods", "plain", "learned weights"]
TINY_FLIP = [*TINY, *TWO, "--tasks", "flip", "--size", "200"]


def run_here(folder: Path, *options: str) -> dict:
    import reweight

    return reweight.main(["--output", str(folder), "--workers", "1", *options])


def metrics_of(folder: Path) -> list[dict]:
    return [json.loads(line) for line in (folder / "metrics.jsonl").read_text().splitlines()]


def small_problem(dtype=torch.float64):
    """Return a network of the example's kind, a batch and clean images."""
    from common.digit_data import Images
    from common.reweight_training import build_network

    torch.manual_seed(0)
    network = build_network(8, 3, channels=2).to(dtype)
    batch = Images(torch.rand(6, 1, 8, 8, dtype=dtype), torch.tensor([0, 1, 2, 0, 1, 2]))
    clean = Images(torch.rand(5, 1, 8, 8, dtype=dtype), torch.tensor([0, 1, 2, 1, 0]))
    return network, batch, clean


def losses_of(network, batch):
    return functional.cross_entropy(network(batch.x), batch.y, reduction="none")


class TestExampleGradient:
    LR = 0.3

    def computed(self, network, batch, clean):
        from common.reweight_training import example_gradient

        return example_gradient(network, losses_of(network, batch), clean, self.LR)

    def test_central_differences(self):
        network, batch, clean = small_problem()
        gradient = self.computed(network, batch, clean)

        def clean_loss(weights: torch.Tensor) -> float:
            stepped = copy.deepcopy(network)
            (weights * losses_of(stepped, batch)).sum().backward()
            with torch.no_grad():
                for p in stepped.parameters():
                    p -= self.LR * p.grad
                return functional.cross_entropy(stepped(clean.x), clean.y).item()

        h = 1e-5
        differences = torch.stack(
            [
                torch.tensor((clean_loss(h * unit) - clean_loss(-h * unit)) / (2 * h))
                for unit in torch.eye(len(batch), dtype=torch.float64)
            ]
        )
        assert gradient.abs().max() > 1e-3
        torch.testing.assert_close(gradient, differences.double(), rtol=1e-6, atol=1e-9)

    def test_closed_form_is_the_inner_product_of_the_gradients(self):
        network, batch, clean = small_problem()

        def flat_gradient(loss):
            grads = torch.autograd.grad(loss, list(network.parameters()), retain_graph=True)
            return torch.cat([g.flatten() for g in grads])

        of_clean = flat_gradient(functional.cross_entropy(network(clean.x), clean.y))
        losses = losses_of(network, batch)
        expected = torch.stack([-self.LR * of_clean @ flat_gradient(loss) for loss in losses])
        actual = self.computed(network, batch, clean)
        torch.testing.assert_close(actual, expected, rtol=1e-10, atol=1e-14)

    def test_the_network_is_what_it_was_and_the_losses_keep_their_graph(self):
        from common.reweight_training import example_gradient

        network, batch, clean = small_problem()
        before = list(network.parameters())
        values = [p.detach().clone() for p in before]
        losses = losses_of(network, batch)
        example_gradient(network, losses, clean, self.LR)
        assert all(a is b for a, b in zip(network.parameters(), before))
        assert all(torch.equal(p, v) and p.grad is None for p, v in zip(before, values))
        losses.sum().backward()
        assert all(p.grad is not None for p in before)


class TestWeights:
    def test_negative_parts_share_one(self):
        from common.reweight_training import example_weights

        weights = example_weights(torch.tensor([-3.0, 2.0, -1.0, 0.0]))
        assert weights.tolist() == [0.75, 0.0, 0.25, 0.0]

    def test_all_zero_if_no_example_helps(self):
        from common.reweight_training import example_weights

        assert example_weights(torch.tensor([3.0, 0.5])).tolist() == [0.0, 0.0]

    def test_every_method_sums_to_one(self):
        from common.digit_data import flipped, load_digits
        from common.reweight_training import METHODS, Batch, build_network

        generator = torch.Generator().manual_seed(0)
        problem = flipped(load_digits(), 0.4, 60, 10, generator)
        network = build_network(8, 10, channels=4)
        losses = losses_of(network, problem.train)
        batch = Batch(network, losses, problem.train.y, problem, generator, 0.1)
        for method in METHODS.values():
            weights = method.weights(batch)
            assert weights.shape == (60,)
            assert weights.min() >= 0
            assert weights.sum().item() == pytest.approx(1.0, abs=1e-5)

    def test_class_weights_give_both_digits_the_same_total(self):
        from common.digit_data import imbalanced, load_digits
        from common.reweight_training import METHODS, Batch, build_network

        problem = imbalanced(load_digits(), (4, 9), 0.9, 200, 10, torch.Generator())
        everything = torch.cat([problem.train.y, problem.clean.y])
        losses, network = torch.ones(200), build_network(8, 2, channels=2)
        batch = Batch(network, losses, everything, problem, torch.Generator(), 0.1)
        weights = METHODS["class weights"].weights(batch)
        assert weights[everything == 0].sum().item() == pytest.approx(0.5, abs=1e-5)


class TestProblems:
    def test_imbalance(self):
        from common.digit_data import imbalanced, load_digits

        problem = imbalanced(load_digits(), (4, 9), 0.98, 500, 6, torch.Generator().manual_seed(1))
        assert torch.bincount(problem.train.y).tolist() == [10 - 3, 490 - 3]
        assert torch.equal(problem.marked, problem.train.y == 0)
        assert torch.bincount(problem.clean.y).tolist() == [3, 3]
        rare, frequent = torch.bincount(problem.test.y).tolist()
        assert rare == frequent > 60

    def test_flips(self):
        from common.digit_data import Source, flipped, load_digits

        digits = load_digits()
        source = Source(digits.test, digits.test, distort=False)  # so that originals are known
        problem = flipped(source, 0.4, 1000, 20, torch.Generator().manual_seed(1))
        assert torch.bincount(problem.clean.y).tolist() == [2] * 10
        right = {x.numpy().tobytes(): y.item() for x, y in zip(digits.test.x, digits.test.y)}
        truth = torch.tensor([right[x.numpy().tobytes()] for x in problem.train.x])
        assert torch.equal(truth != problem.train.y, problem.marked)
        assert problem.marked.sum() == 400
        differences = (problem.train.y - truth)[problem.marked] % 10
        assert torch.bincount(differences, minlength=10)[1:].min() > 20  # to all other nine
        clean = torch.tensor([right[x.numpy().tobytes()] for x in problem.clean.x])
        assert torch.equal(clean, problem.clean.y)
        trained = {x.numpy().tobytes() for x in problem.train.x}
        assert not trained & {x.numpy().tobytes() for x in problem.clean.x}

    def test_no_test_image_is_trained_on(self):
        from common.digit_data import load_digits

        train, test = load_digits().divided(torch.Generator().manual_seed(3))
        assert len(train) + len(test) == 1797
        assert not {x.numpy().tobytes() for x in train.x} & {x.numpy().tobytes() for x in test.x}

    def test_seeds_repeat(self):
        from common.digit_data import flipped, load_digits

        one, two, other = (
            flipped(load_digits(), 0.4, 50, 10, torch.Generator().manual_seed(s)) for s in (1, 1, 2)
        )
        assert torch.equal(one.train.x, two.train.x)
        assert torch.equal(one.train.y, two.train.y)
        assert not torch.equal(one.train.x, other.train.x)


class TestRun:
    def test_wrong_labels_lose_weight_and_accuracy_is_gained(self, tmp_path):
        options = ["--tasks", "flip", *TWO, "--threads", "1"]
        results = run_here(tmp_path, *options, "--seeds", "1", "--steps", "250", "--batch", "50")
        rows = {row["method"]: row for row in results["accuracies"]}
        learned = rows["learned weights"]
        assert learned["marked_weight"] < 0.8 * learned["other_weight"]
        assert learned["test_accuracy"] > 60  # chance is 10
        assert rows["plain"]["marked_weight"] == pytest.approx(1.0, abs=1e-4)
        for method in rows:
            losses = [row["loss"] for row in metrics_of(tmp_path)[1:] if row["method"] == method]
            assert losses[-1] < losses[0]
        assert (tmp_path / "reweight.png").read_bytes().startswith(b"\x89PNG")
        assert json.loads((tmp_path / "results.json").read_text()) == results
        assert {claim["holds"] for claim in results["claims"]} == {None}  # one seed shows nothing
        assert results["seconds"] > 0

    @pytest.mark.usefixtures("no_figures")
    @pytest.mark.thorough
    def test_a_rare_digit_gains_weight(self, tmp_path):
        options = ["--tasks", "imbalance", *TWO]
        options += ["--threads", "1", "--seeds", "1", "--steps", "100", "--proportions", "0.98"]
        rows = {row["method"]: row for row in run_here(tmp_path, *options)["accuracies"]}
        assert rows["learned weights"]["marked_weight"] > 5
        assert rows["learned weights"]["test_accuracy"] > rows["plain"]["test_accuracy"]

    @pytest.mark.usefixtures("no_figures")
    def test_interrupted_and_resumed_gives_the_same(self, tmp_path, monkeypatch):
        import reweight

        straight = run_here(tmp_path / "straight", *TINY_FLIP)
        train, calls = reweight.train, []

        def interrupted_train(*args):
            calls.append(args)
            if len(calls) == 3:
                raise KeyboardInterrupt
            return train(*args)

        monkeypatch.setattr(reweight, "train", interrupted_train)
        with pytest.raises(SystemExit, match="--resume"):
            run_here(tmp_path / "cut", *TINY_FLIP)
        rows = metrics_of(tmp_path / "cut")[1:]
        assert len({(row["method"], row["seed"]) for row in rows}) == 2
        resumed = run_here(tmp_path / "cut", *TINY_FLIP, "--resume")
        assert len(calls) == 3 + 2
        assert resumed["accuracies"] == straight["accuracies"]
        assert metrics_of(tmp_path / "cut") == metrics_of(tmp_path / "straight")

    @pytest.mark.thorough
    def test_several_at_once_give_the_same(self, tmp_path):
        options = [*TINY_FLIP, "--threads", "1", "--workers"]
        one = run_here(tmp_path / "one", *options, "1")
        two = run_here(tmp_path / "two", *options, "2")
        assert one["accuracies"] == two["accuracies"]
        assert metrics_of(tmp_path / "one") == metrics_of(tmp_path / "two")

    def test_full_takes_the_proportions_of_the_paper(self):
        import reweight

        args = reweight.parse(["--full", "--data", "mnist", "--root", "somewhere"])
        assert args.proportions == [0.9, 0.95, 0.98, 0.99, 0.995]
        assert args.seeds == 10


class TestBadInput:
    @pytest.mark.parametrize(
        ("options", "message"),
        [
            (["--clean", "60", "--proportions", "0.995"], "25 of the rare digit; 60 clean"),
            (["--clean", "7"], "7 clean images, half"),
            (["--tasks", "flip", "--flip-clean", "15"], "15 clean images are no multiple"),
            (["--tasks", "flip", "--flip-clean", "990"], "leave none to train on"),
        ],
        ids=["too-many", "odd", "no-multiple", "none-left"],
    )
    def test_data_that_cannot_be_made(self, tmp_path, options, message):
        with pytest.raises(SystemExit, match=message):
            run_here(tmp_path, *options)
        assert not (tmp_path / "metrics.jsonl").exists()

    @pytest.mark.parametrize(
        ("options", "message"),
        [
            (["--data", "mnist"], "needs --root"),
            (["--full"], "--full needs --data mnist"),
            (["--digits", "4", "4"], "two different digits"),
            (["--digits", "4", "12"], "must be a digit"),
            (["--proportions", "1.5"], "between 0 and 1"),
        ],
        ids=["root", "full", "same", "no-digit", "share"],
    )
    def test_command_line(self, capsys, options, message):
        with pytest.raises(SystemExit):
            run_here(Path("nowhere"), *options)
        assert message in capsys.readouterr().err

    def test_unwritable_folder(self, tmp_path):
        (tmp_path / "file").write_text("")
        with pytest.raises(SystemExit, match="Cannot write to the output folder"):
            run_here(tmp_path / "file" / "folder")

    def test_a_run_is_not_overwritten_unasked(self, tmp_path):
        (tmp_path / "metrics.jsonl").write_text("precious")
        with pytest.raises(SystemExit, match="--overwrite"):
            run_here(tmp_path)
        assert (tmp_path / "metrics.jsonl").read_text() == "precious"

    def test_other_settings_are_not_resumed(self, tmp_path):
        few = [*TINY_FLIP, "--methods", "plain"]
        run_here(tmp_path, *few)
        with pytest.raises(SystemExit, match=r"flip_rate=0\.4, this run has flip_rate=0\.2"):
            run_here(tmp_path, *few, "--resume", "--flip-rate", "0.2")

    def test_a_method_that_no_task_has(self, tmp_path):
        with pytest.raises(SystemExit, match="class weights"):
            run_here(tmp_path, "--tasks", "flip", "--methods", "class weights")

    def test_no_scikit_learn(self, tmp_path, monkeypatch):
        monkeypatch.setitem(sys.modules, "sklearn", None)
        with pytest.raises(SystemExit, match=r"pip install \"torchopt\[examples\]\""):
            run_here(tmp_path)


def write_idx(path: Path, array) -> None:
    """Write bytes as the IDX format has them: two zeros, type, dimensions, sizes, data."""
    head = bytes([0, 0, 8, array.ndim]) + struct.pack(f">{array.ndim}I", *array.shape)
    content = head + array.astype(numpy.uint8).tobytes()
    path.write_bytes(gzip.compress(content) if path.suffix == ".gz" else content)


def write_mnist(folder: Path, count: int) -> dict:
    """Write four small files with a bar at a place that depends on the label."""
    folder.mkdir(exist_ok=True)
    labels = numpy.arange(count) % 10
    images = numpy.random.default_rng(0).integers(0, 60, (count, 28, 28))
    for image, label in zip(images, labels):
        image[4 + 2 * label : 6 + 2 * label, 4:24] = 255
    for name, ending in (("train", ""), ("t10k", ".gz")):
        write_idx(folder / f"{name}-images-idx3-ubyte{ending}", images)
        write_idx(folder / f"{name}-labels-idx1-ubyte{ending}", labels)
    return {"images": images, "labels": labels}


class TestMnistFiles:
    def test_read(self, tmp_path):
        from common.digit_data import load_mnist

        written = write_mnist(tmp_path, 30)
        source = load_mnist(tmp_path)
        for part in (source.train, source.test):
            assert part.x.shape == (30, 1, 28, 28)
            assert numpy.array_equal((part.x[:, 0] * 255).round().numpy(), written["images"])
            assert numpy.array_equal(part.y.numpy(), written["labels"])

    @pytest.mark.usefixtures("no_figures")
    def test_trains_from_files(self, tmp_path):
        write_mnist(tmp_path / "files", 400)
        options = ["--data", "mnist", "--root", str(tmp_path / "files"), "--size", "40"]
        options += ["--proportions", "0.8", "--clean", "6", "--flip-clean", "20", *TINY, *TWO]
        results = run_here(tmp_path / "run", *options, "--seeds", "1")
        assert len(results["accuracies"]) == 2 + 2

    def test_too_few_images(self, tmp_path):
        write_mnist(tmp_path / "files", 100)
        options = ["--data", "mnist", "--root", str(tmp_path / "files"), *TINY]
        options += ["--tasks", "imbalance"]
        with pytest.raises(SystemExit, match="of one kind are asked for, there are 10"):
            run_here(tmp_path / "run", *options)

    @pytest.mark.parametrize(
        ("damage", "message"),
        [
            (lambda path: path.unlink(), "No file train-images-idx3-ubyte or"),
            (lambda path: path.write_bytes(b"<html>not found</html>"), "begins with 00000803"),
            (lambda path: path.write_bytes(path.read_bytes()[:-5]), "bytes of data for the shape"),
            (lambda path: write_idx(path, numpy.zeros((7, 28, 28))), "7 training images have 30"),
        ],
        ids=["missing", "web-page", "truncated", "other-count"],
    )
    def test_damage_is_named(self, tmp_path, damage, message):
        from common.digit_data import load_mnist

        write_mnist(tmp_path, 30)
        damage(tmp_path / "train-images-idx3-ubyte")
        with pytest.raises((ValueError, FileNotFoundError), match=message):
            load_mnist(tmp_path)

    def test_truncated_gzip(self, tmp_path):
        from common.digit_data import load_mnist

        write_mnist(tmp_path, 30)
        path = tmp_path / "t10k-labels-idx1-ubyte.gz"
        path.write_bytes(path.read_bytes()[:-12])
        with pytest.raises(ValueError, match=r"t10k-labels-idx1-ubyte\.gz cannot be read"):
            load_mnist(tmp_path)
