"""What the cards say about a family, its data and its papers; every figure comes from elsewhere."""

from __future__ import annotations

from dataclasses import dataclass


@dataclass(frozen=True)
class FamilyText:
    """A family's part of a card."""

    about: str
    pipeline_tag: str
    snippet: str
    papers: tuple[str, ...]
    language: str | None = None


@dataclass(frozen=True)
class DataText:
    """A data set's part of a card.

    Attributes:
        repository: on the Hub; None where none is known to hold these data.
        title: its name.
        note: what to know about it.
        limits: what it means for a model trained on it.
        published: test figures of others.
        subset: what the Hub calls the part of the repository that is measured.
        beside: `published` in a few words, for README's table.
    """

    repository: str | None
    title: str
    note: str
    limits: str = ""
    published: str = ""
    subset: str = "default"
    beside: str = ""


EQUILIBRIUM = (
    "A deep equilibrium model has one map instead of a stack of layers: its output is the state that "
    "the map leaves unchanged, found by a solver. The number of solver steps can be chosen at every "
    "call, and training needs no memory for them."
)

#: Where an example names the checkpoint.
NAME_PLACE = "MODEL"

_IMAGE_SNIPPET = """\
from PIL import Image
from deqzoo import DEQModel, MDEQImageProcessor

model = DEQModel.from_pretrained(MODEL)
processor = MDEQImageProcessor.from_pretrained(MODEL)
inputs = processor(images=Image.open("picture.png"), return_tensors="pt")
output = model(**inputs)
print(model.config.id2label[output.logits.argmax(-1).item()])
print(output.n_steps, output.residual, output.converged)
"""

_TEXT_SNIPPET = """\
from transformers import AutoTokenizer
from deqzoo import DEQModel, detokenize, prepare_text, text_style

model = DEQModel.from_pretrained(MODEL)
tokenizer = AutoTokenizer.from_pretrained(MODEL)
# The tokenizer reads words between spaces, as the corpus writes them: "wasn 't", not "wasn't".
text = "The company, which wasn't well-known, said"
text = prepare_text(text, tokenizer.get_vocab(), text_style(tokenizer)).text
inputs = tokenizer(text, return_tensors="pt")
tokens = model.generate(inputs["input_ids"], max_new_tokens=20, do_sample=False)
print(detokenize(tokenizer.decode(tokens[0])))
"""

_GRAPH_SNIPPET = """\
import torch
from deqzoo import DEQModel

model = DEQModel.from_pretrained(MODEL)
features = torch.zeros(4, model.config.num_features)
features[:, 0] = 1
edges = torch.tensor([[0, 1, 1, 2, 2, 3], [1, 0, 2, 1, 3, 2]])
output = model(features, edge_index=edges)
print(output.logits.softmax(-1), output.n_steps)
"""

FAMILY_TEXTS = {
    "mdeq": FamilyText(
        about="This is an MDEQ: the state holds features of a picture at several resolutions at once, "
        "and a small head classifies them.",
        pipeline_tag="image-classification",
        snippet=_IMAGE_SNIPPET,
        papers=("mdeq", "phantom"),
    ),
    "deq_transformer": FamilyText(
        about="This is a DEQ-Transformer: one transformer block with relative attention, applied until "
        "the states of all tokens stop changing, predicts the next word.",
        pipeline_tag="text-generation",
        snippet=_TEXT_SNIPPET,
        papers=("deq", "phantom", "jacobian"),
        language="en",
    ),
    "ignn": FamilyText(
        about="This is an IGNN: node states are the equilibrium of a graph convolution, so that a node "
        "can be reached from any distance, and a projection of the weights keeps that equilibrium "
        "unique.",
        pipeline_tag="graph-ml",
        snippet=_GRAPH_SNIPPET,
        papers=("ignn", "phantom"),
    ),
}

#: By task, as `zoo.TASKS` and `Entry.task` call them.
TASK_LIMITS = {
    "image classification": "It knows only the classes it was trained on and names one of them for "
    "every picture. Its probabilities are those of its training data, whose selection of pictures it "
    "inherits; do not decide anything about people with it. Where a picture's equilibrium is "
    "reported as not converged, its label is that of an early stop.",
    "language modelling": "It is a word-level model: words outside its vocabulary become `<unk>`, and "
    "what it writes is fluent at best, never reliable. It repeats the views and errors of its corpus. "
    "It is meant for research on equilibrium models.",
    "graph classification": "It expects graphs with the node features of its data set, in their "
    "order, and names one of its classes for every graph.",
    "node classification": "It expects graphs with the node features of its data set, in their "
    "order, and knows no other labels than that set's.",
    "features": "It gives states and no predictions; where an equilibrium is reported as not "
    "converged, they are those of an early stop.",
}

#: What a model is good for, by task.
TASK_USES = {
    "image classification": "studying equilibrium models (solvers, gradients, early answers), for "
    "teaching them on one processor, and as a start for training on small pictures of your own.",
    "language modelling": "studying equilibrium models on text and the steps that each word takes, and "
    "as a start for training on texts of your own.",
    "graph classification": "studying equilibrium models on graphs, where a node is reached from any "
    "distance, and as a start for graphs with the same features.",
    "node classification": "studying equilibrium models on large graphs, and comparing gradients of "
    "models trained alike.",
    "features": "states to build on.",
}

PICTURE_LIMITS = (
    "Every picture is scaled and cut to its middle {size} × {size} pixels: what is small or near its "
    "border can be lost."
)

_FOLD_LIMITS = (
    "The data set is small, so that figures vary by several points between folds; these weights are "
    "those of one fold."
)

_PROTEIN_LIMITS = (
    "The figures are those of one run on one split. The proteins asked about lie in the same graph as "
    "those learnt from: nothing was measured on other graphs. It is no tool for deciding about "
    "proteins or medicine."
)

DATA_TEXTS = {
    "cifar10": DataText(
        "uoft-cs/cifar10",
        "CIFAR-10",
        "45,000 pictures to train and 5,000 to choose by, taken from the published training split by "
        "a seeded hash of the pixels; the 10,000 test pictures were never used to choose "
        "anything, and are measured at each release. The pictures' licence is unknown.",
        "Its training pictures have 32 × 32 pixels; photographs scaled down to that look different.",
        subset="plain_text",
        beside="the authors' largest MDEQ: 87.3 % after 42 PFLOP, 94.8 % after 277",
    ),
    "imagenette": DataText(
        "frgfm/imagenette",
        "Imagenette",
        "The published validation split serves as test split; 950 training pictures are kept to "
        "choose by.",
        "Imagenette's ten classes were picked from ImageNet's because they are easy to tell apart, so "
        "that its accuracy says little about others.",
        "from scratch at 128 pixels, on the leaderboard of its authors: 85.8 / 91.6 / 93.6 / 94.2 % after "
        "5 / 20 / 80 / 200 epochs (convolutional networks)",
        subset="160px",
        beside="convolutional networks: 85.8 / 91.6 / 93.6 % after 5 / 20 / 80 epochs",
    ),
    "tiny-imagenet": DataText(
        "zh-plus/tiny-imagenet",
        "Tiny ImageNet",
        "The published validation split serves as test split, since the labels of the test split are not "
        "public; 5,000 training pictures are kept to choose by. ImageNet's terms allow research use only.",
        "Its pictures have 64 × 64 pixels, 500 of each class to learn from; many classes can hardly be told "
        "apart at that size.",
        subset="data",
    ),
    "wikitext-2": DataText(
        "Salesforce/wikitext",
        "WikiText-2",
        "The word-level corpus with its published splits and vocabulary (CC BY-SA 3.0).",
        "Its corpus is small: two million words of articles of the English Wikipedia.",
        "perplexity 65.8 (AWD-LSTM, 33M parameters, hundreds of epochs; Merity et al. 2018), a single "
        "model without pre-training or dynamic evaluation",
        subset="wikitext-2-v1",
        beside="AWD-LSTM, 33M: 65.8",
    ),
    "ptb": DataText(
        "ptb-text-only/ptb_text_only",
        "Penn Treebank (words)",
        "The usual preparation with 10,000 words; the underlying text is licensed by the LDC.",
        "Its corpus is small and old: 0.9 million words of the Wall Street Journal of 1989, in lower "
        "case, without punctuation and with N for numbers.",
        "perplexity 57.3 (AWD-LSTM; Merity et al. 2018) and 57.1 (a DEQ of the TrellisNet kind; Bai et al. "
        "2019), each a single model of 24M parameters, trained for hundreds of epochs, without dynamic "
        "evaluation",
        subset="penn_treebank",
        beside="AWD-LSTM, 24M: 57.3",
    ),
    "twitch": DataText(
        None,
        "Twitch social networks",
        "Networks of users in several languages, one graph each, in two classes of users (mature "
        "content or not): trained on DE, ES, FR and RU, the epoch chosen on PT, tested on EN "
        "(Rozemberczki, Allen, Sarkar 2021; the files are those of EdisonLeeeee/GraphData on GitHub).",
        "The figures are those of one run and one test network, in which the classes are shared out "
        "otherwise than in those trained on: the area under the ROC curve is the measure, and the "
        "accuracy says little. Do not decide anything about people with it.",
        beside="logistic regression on a node's own features: AUC 0.583",
    ),
    "humloc": DataText(
        None,
        "HumLoc",
        "One graph of 3,106 human proteins with 32 features and 14 labels, the places in the cell "
        "where a protein is found, 1.19 of them per protein; 1,675 proteins to train, 187 to choose "
        "by and 1,244 to test (Zhao, Dong, Hanjalic, Khosla 2023; the files are those of "
        "Tianqi-py/MLGNC on GitHub, without a stated licence).",
        _PROTEIN_LIMITS,
        beside="logistic regression on a node's own features: 42.6 %",
    ),
    "eukloc": DataText(
        None,
        "EukLoc",
        "One graph of 7,766 proteins of eukaryotes with 32 features and 22 labels, the places in the "
        "cell where a protein is found, 1.15 of them per protein; 4,192 proteins to train, 466 to "
        "choose by and 3,108 to test (Zhao, Dong, Hanjalic, Khosla 2023; the files are those of "
        "Tianqi-py/MLGNC on GitHub, without a stated licence).",
        _PROTEIN_LIMITS,
        beside="logistic regression on a node's own features: 43.3 %",
    ),
    "proteins": DataText(
        "graphs-datasets/PROTEINS",
        "PROTEINS",
        "1,113 graphs in two classes (TU collection).",
        f"{_FOLD_LIMITS} It is no tool for deciding about proteins or medicine.",
        beside="over ten folds: this recipe 74.8 %, logistic regression on counts 74.4 %, IGNN's paper 77.7 %",
    ),
    "cox2": DataText(
        None,
        "COX2",
        "467 graphs in two classes (TU collection).",
        f"{_FOLD_LIMITS} It is no tool for deciding about molecules or medicine.",
        beside="over ten folds: this recipe 80.9 %, logistic regression on counts 79.0 %",
    ),
}

PAPERS = {
    "deq": """\
@inproceedings{bai2019deep,
  title     = {Deep Equilibrium Models},
  author    = {Bai, Shaojie and Kolter, J. Zico and Koltun, Vladlen},
  booktitle = {Advances in Neural Information Processing Systems},
  year      = {2019}
}""",
    "mdeq": """\
@inproceedings{bai2020multiscale,
  title     = {Multiscale Deep Equilibrium Models},
  author    = {Bai, Shaojie and Koltun, Vladlen and Kolter, J. Zico},
  booktitle = {Advances in Neural Information Processing Systems},
  year      = {2020}
}""",
    "ignn": """\
@inproceedings{gu2020implicit,
  title     = {Implicit Graph Neural Networks},
  author    = {Gu, Fangda and Chang, Heng and Zhu, Wenwu and Sojoudi, Somayeh and El Ghaoui, Laurent},
  booktitle = {Advances in Neural Information Processing Systems},
  year      = {2020}
}""",
    "jacobian": """\
@inproceedings{bai2021stabilizing,
  title     = {Stabilizing Equilibrium Models by Jacobian Regularization},
  author    = {Bai, Shaojie and Koltun, Vladlen and Kolter, J. Zico},
  booktitle = {International Conference on Machine Learning},
  year      = {2021}
}""",
    "phantom": """\
@inproceedings{geng2021training,
  title     = {On Training Implicit Models},
  author    = {Geng, Zhengyang and Zhang, Xin-Yu and Bai, Shaojie and Wang, Yisen and Lin, Zhouchen},
  booktitle = {Advances in Neural Information Processing Systems},
  year      = {2021}
}""",
}


@dataclass(frozen=True)
class ConvertedText:
    """A card for weights that their authors publish and the user converts."""

    family: str
    task: str
    title: str
    command: str
    source: str
    figure: str
    limits: str
    papers: tuple[str, ...]


_IMAGENET_LIMITS = (
    f"{PICTURE_LIMITS.format(size=224)} Its classes are the thousand of ImageNet, many of them breeds "
    "of dogs."
)

CONVERTED = {
    "mdeq-imagenet-small": ConvertedText(
        "mdeq",
        "image classification",
        "MDEQ SMALL on ImageNet",
        "deqzoo convert mdeq MDEQ_Small_Cls.pkl --config mdeq-imagenet-small --output {name}",
        "the model zoo in the README of github.com/locuslab/deq",
        "75.5 % top-1 on the ImageNet validation set (Bai, Koltun, Kolter 2020)",
        _IMAGENET_LIMITS,
        ("mdeq",),
    ),
    "mdeq-imagenet-xl": ConvertedText(
        "mdeq",
        "image classification",
        "MDEQ XL on ImageNet",
        "deqzoo convert mdeq MDEQ_XL_Cls.pkl --config mdeq-imagenet-xl --output {name}",
        "the model zoo in the README of github.com/locuslab/deq",
        "79.2 % top-1 on the ImageNet validation set (Bai, Koltun, Kolter 2020)",
        _IMAGENET_LIMITS,
        ("mdeq",),
    ),
    "deq-transformer-wikitext103": ConvertedText(
        "deq_transformer",
        "language modelling",
        "DEQ-Transformer on WikiText-103",
        "deqzoo convert deq-transformer pretrained_wt103_deqtrans_v3.pkl "
        "--config deq-transformer-wikitext103-post --output {name}",
        "the model zoo in the README of github.com/locuslab/deq",
        "test perplexity 23.1 with at most 30 solver steps and a memory of 300 tokens (README of "
        "locuslab/deq); this preset keeps the 150 of their evaluation script",
        "Its corpus is 103 million words of articles of the English Wikipedia, little beside that of "
        "later language models.",
        ("deq",),
    ),
    "ignn-ppi": ConvertedText(
        "ignn",
        "node classification",
        "IGNN on PPI",
        "deqzoo convert ignn STATE_DICT.pt --config ppi --output {name}",
        "a state dict saved by the code of github.com/SwiftieH/IGNN, or, with `--config "
        "ppi-torchdeq`, the model zoo of github.com/locuslab/torchdeq",
        "micro-averaged F1 of 97.6 % on the test graphs (Gu et al. 2020)",
        "Its data set has 24 graphs of proteins in human tissues, of which two are tested, so that the "
        "figure says little about other graphs. It is no tool for deciding about proteins or medicine.",
        ("ignn",),
    ),
}
