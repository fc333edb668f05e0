"""French text with its summaries, out of Debian 12: the data of the tiny model.

    python tiny/data.py FOLDER

Debian's translators have written some twenty thousand summaries of French texts. The short
description of a package sums up its long description; the NOM line of a manual page sums up the
page. This file fetches both with the user's own apt (no root, nothing installed), and more French
documentation to pretrain on, then writes into FOLDER:

    pairs.{train,validation,test}.jsonl   {"document", "summary", "source", "name"} a line
    pretrain.jsonl                        {"document"} a line, nothing of the two held-out parts
    sentencepiece.bpe.model               8,000 pieces, the special ones where BARThez has them
    stats.json                            what was written, and out of which packages' versions

What apt fetched (250 MB) stays in FOLDER/apt and is not fetched again. Beside Debian's apt and
dpkg it needs `sentencepiece`.
"""

import argparse
import collections
import gzip
import hashlib
import html.parser
import io
import json
import pathlib
import random
import re
import shutil
import subprocess
import sys
import tarfile
import unicodedata

import sentencepiece

# The first half has manual pages, which also give pairs; the second, books and help.
PACKAGES = """
    manpages-fr manpages-fr-dev adduser apt bilibop-common cups-bsd cups-client cups-daemon
    cups-ipp-utils cups-ppdc debconf-doc debconf-i18n debconf-utils debhelper debianutils devscripts
    dos2unix dpkg dpkg-dev fakeroot gputils kdesdk-scripts live-build login man-db menu mkvtoolnix
    net-tools passwd po-debconf po4a poxml procps psmisc schroot sensible-utils svn-buildpackage
    sysvinit-core vim-common wireless-tools xz-utils

    apache2-doc apt-doc aptitude-doc-fr auto-multiple-choice-doc debian-edu-doc-fr debian-faq-fr
    debian-handbook debian-history debian-reference-fr developers-reference-fr drgeo-doc
    evince-common evolution-common genius-common gimp-help-fr gnome-devel-docs gnome-user-docs
    gosa-help-fr grisbi-common harden-doc installation-guide-amd64 kicad-doc-fr kio konqueror
    libreoffice-help-fr lilypond-doc-html-fr maint-guide-fr mate-user-guide mplayer-doc omegat orca
    seahorse shotwell-common solfege-doc tellico-doc texworks-help-fr tuxpaint-data
    ubuntu-packaging-guide-html-fr
""".split()

# Files whose path says French: man/fr/…, fr-FR/….html, …/fr/….page, ….fr.html
FRENCH_FILE = re.compile(r"/man/fr[^/]*/man\d/.*\.gz$"
                         r"|[/._-]fr([_-]FR)?[/.](?!.*big-page).*\b(x?html|page|xml|docbook)$")
PREFIX = re.compile(r"(lib(rust-)?|python3?-|node-|r-(cran|bioc)-|golang-(git(hub|lab)(-com)?-)?|"
                    r"ruby-|fonts-|task-|haskell-|ghc-|php\d?-|elpa-|texlive-|gir1\.2-|xfonts-)+")


def stem_of(name):
    """What kin share: libfoobar-dev and python3-foobar -> fooba."""
    return re.sub(r"\W", "", PREFIX.sub("", name.lower(), count=1))[:5]


def split_of(name):
    """Which part a name belongs to: kin, whose texts are nearly the same, go together."""
    percent = int(hashlib.sha256(stem_of(name).encode()).hexdigest(), 16) % 100
    return "test" if percent < 4 else "validation" if percent < 6 else "train"


def tidy(text):
    """A paragraph on one line, in the form that SentencePiece gives it: no no-break spaces."""
    return re.sub(r"\s+", " ", unicodedata.normalize("NFKC", text.replace("⋅", " "))).strip()


def frenchness(text):
    """Above 0 for French, below for English: untranslated text hides among the translated."""
    words = collections.Counter(re.findall(r"\w+", text.lower()))
    french = sum(words[w] for w in "le la les des du un une et est pour dans que qui sur".split())
    return french - 2 * sum(words[w] for w in "the of and to is for with that this from".split())


# ---------------------------------------------------------------------------------------- apt

def apt(folder, *command):
    """Runs apt with lists and cache of its own under `folder`, in folder/incoming."""
    for part in ("lists/partial", "cache/archives/partial", "debs", "incoming"):
        (folder / part).mkdir(parents=True, exist_ok=True)
    options = [f"-oDir::State::Lists={folder / 'lists'}", f"-oDir::Cache={folder / 'cache'}",
               "-oAcquire::Languages=fr", "-oAPT::Sandbox::User=", "-qq"]
    result = subprocess.run(["apt-get", *options, *command], cwd=folder / "incoming",
                            stdout=subprocess.DEVNULL, stderr=subprocess.PIPE)
    return tidy(result.stderr.decode())


def fetch(folder):
    """Downloads what is missing; returns Debian's French descriptions and {package: its .deb}."""
    if shutil.which("apt-get") is None:
        raise FileNotFoundError("there is no apt-get here: run this on Debian 12")

    def missing():
        return [package for package in PACKAGES if not any(folder.glob(f"debs/{package}_*.deb"))]

    def indexes():
        return sorted(map(str, folder.glob("lists/*_Translation-fr*")))

    if missing() or not indexes():
        # A third-party source that does not answer fails the update, yet does no harm here.
        said = apt(folder, "update")
        if missing():
            said += apt(folder, "download", *missing())
        # dpkg-deb looks into each: an interrupted download stays behind, for apt to take up again.
        for deb in folder.glob("incoming/*.deb"):
            if subprocess.run(["dpkg-deb", "-c", deb], capture_output=True).returncode == 0:
                deb.rename(folder / "debs" / deb.name)
        if lost := missing() + ["the French descriptions"] * (not indexes()):
            raise OSError(f"apt-get brought no {', '.join(lost)}: this needs Debian 12's main "
                          "archive among apt's sources, and a network. "
                          f"It said: {said[-400:] or 'nothing'}")
    # The machine's settings decide how an index is compressed; apt-helper reads them all.
    text = subprocess.run(["/usr/lib/apt/apt-helper", "cat-file", *indexes()], check=True,
                          stdout=subprocess.PIPE).stdout.decode()
    return text, {package: next(folder.glob(f"debs/{package}_*.deb")) for package in PACKAGES}


def french_files(deb):
    """Yields (path, text) of a package's French pages, straight out of the archive, links aside."""
    with subprocess.Popen(["dpkg-deb", "--fsys-tarfile", deb], stdout=subprocess.PIPE) as process:
        with tarfile.open(fileobj=process.stdout, mode="r|") as archive:
            for member in archive:
                if member.isfile() and FRENCH_FILE.search(member.name):
                    data = archive.extractfile(member).read()
                    data = gzip.decompress(data) if member.name.endswith(".gz") else data
                    try:
                        yield member.name, data.decode()
                    except UnicodeDecodeError:
                        yield member.name, data.decode("latin-1")


# ------------------------------------------------------------------------------- descriptions

def descriptions(index):
    """Yields (name, summary, document) of each entry of a Translation-fr index."""
    for entry in index.split("\n\n"):
        match = re.match(r"Package: (\S+)\n(?:.*\n)*?Description-fr: (.*)\n((?: .*\n?)*)", entry)
        if match is None:
            continue
        name, summary, body = match.groups()
        paragraphs = [[]]
        for line in body.splitlines():
            bullet = re.match(r"\s+[-*+•·o–]\s+(.*)", line)
            if line.strip() == ".":
                paragraphs.append([])
            elif bullet:
                paragraphs.append(["• " + bullet[1]])
            elif line.startswith("  ") and not (paragraphs[-1] and paragraphs[-1][0][0] == "•"):
                paragraphs.append([line])  # set apart by two spaces: a line that must not be joined
            else:
                paragraphs[-1].append(line)
        lines = (tidy(" ".join(lines)) for lines in paragraphs)
        yield name, tidy(summary), "\n".join(line for line in lines if line)


# ------------------------------------------------------------------------------- manual pages

# The named characters of roff that these pages use; a name that is not here vanishes.
SPECIAL = (
    "bu • co © rg ® R ® tm ™ em — en – hy - mi - lq “ rq ” L\" “ R\" ” oq ‘ cq ’ aq ' Aq ' dq \" "
    "ga ` ha ^ ti ~ rs \\ sl / at @ ba | lB [ rB ] Fo « Fc » mu × +- ± <= ≤ >= ≥ != ≠ -> → <- ← "
    "mc µ de ° OE Œ oe œ AE Æ ae æ ss ß sc § S § Eu € no ¬ di ÷").split()
SPECIAL = dict(zip(SPECIAL[::2], SPECIAL[1::2]))
ACCENT = {"'": "\u0301", "`": "\u0300", "^": "\u0302", ":": "\u0308", ",": "\u0327", "~": "\u0303"}
ESCAPE = re.compile(r"""
    \\(?:f(?:\[[^]]*\]|\(..|.) | s(?:\[[^]]*\]|\(..|[-+]?\d{1,2}) | m\[[^]]*\] | k(?:\(..|.)
      | n[-+]?(?:\[[^]]*\]|\(..|.) | [hvwlLDbxoNRSHX]'[^']*' | \$.)     # fonts, motions: no text
    | \\\*?(?:\[(?P<long>[^]]*)\] | \((?P<two>..)) | \\\*(?P<one>.)          # a named character
    | \\(?P<other>.)""", re.VERBOSE)
MACRO = re.compile(r"[.'][ \t]*(\S*)[ \t]*(.*)")
FONT = "B I SM SB R BR IR RB RI BI IB".split()
BREAK = "PP P LP TP TQ IP HP RS RE br sp nf fi Sp".split()
# Sections that sum up nothing: who wrote it, who translated it, and tables that every page repeats.
UNWANTED = re.compile(r"^nom$|traduct|colophon|copyright|auteur|voir aussi|attributs|bibliothèque|"
                      r"signaler|licence|remerciement|droits|async|adresse|translat|author", re.I)


def unescape(text):
    """roff's escapes, as characters: `\\(bu \\fBn'\\('etait\\fP` -> `• n'était`."""
    def character(match):
        name = match["long"] or match["two"] or match["one"]
        if name is None:
            return dict(zip("-e ~0t'`.\\", "-\\    '`.\\")).get(match["other"], "")
        if re.fullmatch(r"u[0-9A-F]{4,5}", name):
            return chr(int(name[1:], 16))
        if len(name) == 2 and name[0] in ACCENT and name[1].isalpha():
            return name[1] + ACCENT[name[0]]
        return SPECIAL.get(name, "")
    return ESCAPE.sub(character, text)


def manual(source):
    """(summary, document) of a page in roff's man macros, or None if it has no NOM section."""
    sections, paragraph = [("", [])], []
    tag = hidden = verbatim = False

    def flush():
        text = tidy(unescape(" ".join(paragraph)))
        if text.strip("• :"):
            sections[-1][1].append(text)
        paragraph.clear()

    source = re.sub(r"(?m)\\[\"#].*$|^[.']\s*\\\".*\n", "", source).replace("\\\n", "")
    for line in source[source.find("\n.SH"):].splitlines():
        macro, rest = MACRO.match(line).groups() if line[:1] in (".", "'") else (None, line)
        if macro in ("EX", "Vb", "TS", "de") or macro == "el" and rest.endswith("\\{\\"):
            hidden = True  # programs, tables, definitions: not prose
        elif macro in ("EE", "Ve", "TE", ".", "\\}"):
            hidden = False
        elif hidden:
            continue
        words = [quoted.replace('""', '"') or bare for quoted, bare in
                 re.findall(r'"((?:[^"]|"")*)"?|((?:\\.|[^\s\\])+)', rest)] if macro else []
        if macro in ("SH", "SS"):
            flush()
            title = tidy(unescape(" ".join(words)))
            sections.append((title, [])) if macro == "SH" else sections[-1][1].append(title)
            tag = verbatim = False
        elif macro in FONT or macro is None and rest.strip():
            # Two letters alternate between two fonts and leave no space: .BR ls (1) -> ls(1)
            glue = "" if macro in ("BR", "IR", "RB", "RI", "BI", "IB") else " "
            paragraph.append(glue.join(words) if macro else rest)
            paragraph += [":"] * tag  # the term of a definition list
            tag = False
            if verbatim:
                flush()
        elif macro in ("UE", "ME") and paragraph:
            paragraph[-1] += "".join(words)  # the punctuation after a link
        elif macro in ("SY", "OP"):
            paragraph.append(" ".join(words) if macro == "SY" else f"[{' '.join(words)}]")
        elif macro is None or macro in BREAK:
            flush()
            tag = macro in ("TP", "TQ")
            verbatim = macro == "nf" or verbatim and macro not in ("fi", "TP", "IP")
            if macro == "IP" and words and (mark := unescape(words[0]).strip()):
                colon = "" if mark[-1] in ".)" else " :"
                paragraph.append("•" if mark in "•-*o+·" else mark + colon)
    flush()
    name = next((lines[0] for title, lines in sections if title.lower() == "nom" and lines), "")
    _, _, summary = re.sub(r"\s+[-–—]+\s+", "\0", name, count=1).partition("\0")
    document = []
    for title, lines in sections:
        lines = [line for line in lines if frenchness(line) >= 0]
        if lines and not UNWANTED.search(title):
            document += [title, *lines] if title else lines
    return (summary.rstrip(" ."), "\n".join(document)) if summary else None


# ------------------------------------------------------------------------------- HTML and XML

class Page(html.parser.HTMLParser):
    """The paragraphs of a page, one a line, without navigation, listings and legal matter."""
    BLOCK = set("""p li h1 h2 h3 h4 h5 h6 title para td th tr dt dd div br section sect1 sect2 sect3
        item desc term entry table listitem simpara note tip body page ul ol dl figure blockquote
        """.split())
    DROPPED = set("""head script style nav header footer aside pre screen programlisting info
        bookinfo articleinfo legalnotice credit index indexterm button form select""".split())
    DROPPED_CLASS = set("""nav navheader navfooter docnav toc toplang bottomlang sphinxsidebar
        related headerlink footer legalnotice indexterm highlight programlisting revhistory
        breadcrumbs""".split())

    def __init__(self, source):
        super().__init__()
        self.lines, self.words, self.dropping, self.depth = [], [], None, 0
        # Menu paths come as neighbours: <gui>Insertion</gui><gui>Filet</gui> -> Insertion > Filet
        self.feed(re.sub(r"</gui\w*>\s*<gui\w*[^>]*>", " > ", source))
        self.close()
        self.flush()

    def flush(self):
        # An entity of the document's own (&konqueror;) is named after what it stands for.
        text = tidy(re.sub(r"&([\w.-]+);", r"\1", "".join(self.words)))
        if text:
            self.lines.append(text)
        self.words = []

    def handle_starttag(self, tag, attributes):
        if self.dropping:
            self.depth += tag == self.dropping
        elif tag in self.DROPPED or self.DROPPED_CLASS.intersection(
                (dict(attributes).get("class") or "").split()):
            self.dropping, self.depth = tag, 1
        elif tag in self.BLOCK:
            self.flush()

    def handle_startendtag(self, tag, attributes):
        if tag in self.BLOCK and not self.dropping:
            self.flush()

    def handle_endtag(self, tag):
        if self.dropping == tag:
            self.depth -= 1
            self.dropping = self.dropping if self.depth else None
        elif tag in self.BLOCK and not self.dropping:
            self.flush()

    def handle_data(self, data):
        if not self.dropping:
            self.words.append(data)


# ------------------------------------------------------------------------------------ choices

def select(candidates):
    """{part: pairs} worth learning from, with none in train that gives a held-out one away."""
    seen, kin, parts = set(), collections.Counter(), collections.defaultdict(list)
    held_out = {row["document"][:100] for row in candidates if split_of(row["name"]) != "train"}
    for row in candidates:
        document, summary, part = row["document"], row["summary"], split_of(row["name"])
        letters = re.sub(r"[\W\d_]+", "", summary + document[:400]).lower()
        start, stem = document[:100], stem_of(row["name"])
        if (len(document) < 60 or not 8 <= len(summary) < len(document)
                or row["source"] == "description" and len(document) > 8000  # lists of contents
                or frenchness(document) <= 0 or frenchness(summary) < 0
                or re.search("factice|transition", summary) or re.search("Ã©|\ufffd", document)
                or document in seen or letters in seen
                # One program's eighty languages read the same: five are enough to learn from, and
                # ten of a family to test on.
                or kin[start] == 5 or kin[part, stem] == (10 if part != "train" else -1)
                or part == "train" and start in held_out):
            continue
        seen |= {document, letters}
        kin[start] += 1
        kin[part, stem] += 1
        parts[part].append(row)
    return parts


def fresh(documents):
    """Drops lines met before (menus, notices, paragraphs that packages share) and English ones."""
    met = collections.Counter()
    for document in documents:
        lines = []
        for line in document.split("\n"):
            met[line] += 1
            if met[line] <= (1 if len(line) > 50 else 5) and frenchness(line) >= 0:
                lines.append(line)
        text = "\n".join(lines)
        if len(text) >= 200 and frenchness(text) > 0:
            yield text


def train_tokenizer(lines):
    """A unigram model whose ids are BARThez': <s> 0, <pad> 1, </s> 2, <unk> 3, <mask> last."""
    model = io.BytesIO()  # given a file, the trainer would write its path into the model
    sentencepiece.SentencePieceTrainer.train(
        sentence_iterator=iter(lines), model_writer=model, vocab_size=7999, model_type="unigram",
        character_coverage=0.9995, num_threads=2, shuffle_input_sentence=False,
        bos_id=0, pad_id=1, eos_id=2, unk_id=3, minloglevel=2)
    # The trainer cannot put a piece last. But the file is a protobuf whose field 1, repeated, holds
    # the pieces in order; one more at its end, {1: name, 2: score, 3: type 3 (control)}, is last.
    piece = b"\x0a\x06<mask>" + b"\x15\0\0\0\0" + b"\x18\x03"
    model.write(b"\x0a" + bytes([len(piece)]) + piece)
    tokenizer = sentencepiece.SentencePieceProcessor(model_proto=model.getvalue())
    assert tokenizer.piece_to_id("<mask>") == len(tokenizer) - 1 == 7999
    return tokenizer


def main(folder):
    index, debs = fetch(folder / "apt")
    candidates = [dict(document=document, summary=summary, source="description", name=name)
                  for name, summary, document in descriptions(index)]
    pages = []
    for deb in debs.values():
        for path, text in french_files(deb):
            if "/man/" not in path:
                pages.append("\n".join(Page(text).lines))
            elif page := manual(text):
                name = path.rpartition("/")[2].split(".")[0]
                candidates.append(dict(document=page[1], summary=page[0], source="manual",
                                       name=name))
    parts = select(candidates)
    pretrain = list(fresh([row["document"] for row in parts["train"]] + pages))
    random.Random(0).shuffle(pretrain)

    files = {f"pairs.{part}.jsonl": rows for part, rows in parts.items()}
    files["pretrain.jsonl"] = [{"document": document} for document in pretrain]
    for name, rows in files.items():
        with open(folder / name, "w", encoding="utf-8") as file:
            file.writelines(json.dumps(row, ensure_ascii=False) + "\n" for row in rows)

    lines = [line for document in pretrain for line in document.split("\n")]
    lines += [row["summary"] for row in parts["train"]]
    # Our own sample: the trainer's would be drawn anew each time.
    sample = random.Random(0).sample(lines, min(len(lines), 150_000))
    tokenizer = train_tokenizer(sample)
    (folder / "sentencepiece.bpe.model").write_bytes(tokenizer.serialized_model_proto())

    pairs = collections.Counter(f"{part} {row['source']}" for part in parts for row in parts[part])
    stats = {"pairs": dict(sorted(pairs.items())),
             "pretrain": {"documents": len(pretrain), "characters": sum(map(len, pretrain)),
                          "tokens": sum(map(len, tokenizer.encode(pretrain)))}}
    print(json.dumps(stats, indent=1))
    # file names are package_version_architecture.deb, a colon written %3a
    stats["packages"] = {package: deb.name.split("_")[1].replace("%3a", ":")
                         for package, deb in debs.items()}
    (folder / "stats.json").write_text(json.dumps(stats, indent=1) + "\n")


if __name__ == "__main__":
    parser = argparse.ArgumentParser(description=__doc__.partition("\n")[0])
    parser.add_argument("folder", type=pathlib.Path, help="where to write, and to keep downloads")
    try:
        main(parser.parse_args().folder.absolute())
    except OSError as error:  # no apt-get, no network, no room
        print(f"data.py: {error}", file=sys.stderr)
        sys.exit(2)
