"""Build the data of the tiny model: French texts with summaries, from Debian.

    python tiny/data.py FOLDER

Debian's translators have written about twenty thousand summaries of French texts. The short
description of a package summarizes its long description. The NOM section of a manual page
summarizes the page. This script downloads both, and more French documentation for pretraining, from
Debian 12 (bookworm). It uses apt with private folders: it needs no root and installs nothing.

It writes into FOLDER:

    pairs.{train,validation,test}.jsonl  one {"document", "summary", "source", "name"} per line
    pairs.fresh.jsonl                    new descriptions of Debian 13 (trixie), in the same form
    pretrain.jsonl                       one {"document"} per line, of the training pairs and books
    sentencepiece.bpe.model              8,000 pieces, with BARThez' ids for the special tokens
    stats.json                           what was written, and the versions of the packages

Run it on Debian 12, with `sentencepiece` installed. The downloads (270 MB) stay in FOLDER/apt; a
second run does not repeat them.
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

# Packages of the first group contain manual pages, those of the second books and help pages.
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

# Paths of French files, such as man/fr/…, fr-FR/….html, …/fr/….page and ….fr.html.
FRENCH_FILE = re.compile(r"/man/fr[^/]*/man\d/.*\.gz$"
                         r"|[/._-]fr([_-]FR)?[/.](?!.*big-page).*\b(x?html|page|xml|docbook)$")


# ------------------------------------------------------------------------------------------------
# Downloads


def apt_get(folder, *command):
    """Run apt-get in folder/debs, with private lists and cache; return its result.

    If the file folder/sources.list exists, it replaces the sources of this machine.
    """
    for part in ("lists/partial", "cache/archives/partial", "debs"):
        (folder / part).mkdir(parents=True, exist_ok=True)
    options = [f"-oDir::State::Lists={folder / 'lists'}", f"-oDir::Cache={folder / 'cache'}",
               "-oAcquire::Languages=fr", "-oAPT::Sandbox::User=", "-qq"]
    sources = folder / "sources.list"
    if sources.exists():
        options += [f"-oDir::Etc::SourceList={sources}", "-oDir::Etc::SourceParts=/dev/null"]
    return subprocess.run(["apt-get", *options, *command], cwd=folder / "debs",
                          capture_output=True, text=True)


def fetch_index(folder, release):
    """Return (mirror, text) of the index of French descriptions of a Debian release."""
    def find():
        listed = apt_get(folder, "indextargets", "--format=$(REPO_URI)\n$(FILENAME)",
                         "Created-By: Translations", "Language: fr", "Component: main",
                         f"Codename: {release}")
        return listed.stdout.splitlines()[:2]

    messages = ""
    if not find():
        # Do not check the exit status: other sources of this machine may fail without harm.
        messages = apt_get(folder, "update").stderr
    if not find():
        raise OSError(f"apt-get did not download the French descriptions of {release}. Check the "
                      "network, and that apt's sources contain the main archive of Debian 12. "
                      f"apt-get said: {tidy(messages)[-400:] or 'nothing'}")
    mirror, path = find()
    # apt may have compressed the index; apt-helper reads every format.
    text = subprocess.run(["/usr/lib/apt/apt-helper", "cat-file", path], check=True,
                          stdout=subprocess.PIPE).stdout.decode()
    return mirror, text


def fetch(folder):
    """Return (index of Debian 12, index of Debian 13, {package: its .deb file})."""
    if shutil.which("apt-get") is None:
        raise FileNotFoundError("apt-get not found: run this on Debian 12")
    mirror, index = fetch_index(folder, "bookworm")
    (folder / "trixie").mkdir(exist_ok=True)
    (folder / "trixie" / "sources.list").write_text(
        "deb [signed-by=/usr/share/keyrings/debian-archive-keyring.gpg lang=fr "
        f"target=Translations] {mirror} trixie main\n")
    _, later_index = fetch_index(folder / "trixie", "trixie")
    # apt-get skips the packages that are complete and resumes an interrupted download.
    download = apt_get(folder, "download", *PACKAGES)
    if download.returncode != 0:
        raise OSError(f"apt-get did not download all packages: {tidy(download.stderr)[-400:]}")
    return index, later_index, {p: next(folder.glob(f"debs/{p}_*.deb")) for p in PACKAGES}


def french_files(deb):
    """Yield (path, text) of each French page in a package; links are skipped."""
    with subprocess.Popen(["dpkg-deb", "--fsys-tarfile", deb], stdout=subprocess.PIPE) as process:
        with tarfile.open(fileobj=process.stdout, mode="r|") as archive:
            for member in archive:
                if member.isfile() and FRENCH_FILE.search(member.name):
                    data = archive.extractfile(member).read()
                    if member.name.endswith(".gz"):
                        data = gzip.decompress(data)
                    try:
                        yield member.name, data.decode()
                    except UnicodeDecodeError:
                        yield member.name, data.decode("latin-1")


# ------------------------------------------------------------------------------------------------
# Text


def tidy(text):
    """Join a paragraph into one line and normalize its characters as SentencePiece does."""
    return re.sub(r"\s+", " ", unicodedata.normalize("NFKC", text.replace("⋅", " "))).strip()


def frenchness(text):
    """Return the number of French function words minus twice that of English ones.

    It is positive for French and negative for paragraphs that were left untranslated.
    """
    words = collections.Counter(re.findall(r"\w+", text.lower()))
    french = sum(words[w] for w in "le la les des du un une et est pour dans que qui sur".split())
    return french - 2 * sum(words[w] for w in "the of and to is for with that this from".split())


def letters(text):
    """Return the letters of a text, without spaces, digits and punctuation, in lower case."""
    return re.sub(r"[\W\d_]+", "", text).lower()


# ------------------------------------------------------------------------------------------------
# Package descriptions


def descriptions(index):
    """Yield a pair for each entry of a Translation-fr index."""
    for entry in index.split("\n\n"):
        match = re.match(r"Package: (\S+)\n(?:.*\n)*?Description-fr: (.*)\n((?: .*\n?)*)", entry)
        if match is None:
            continue
        name, summary, body = match.groups()
        paragraphs = [[]]  # each a list of lines
        for line in body.splitlines():
            bullet = re.match(r"\s+[-*+•·o–]\s+(.*)", line)
            in_list = bool(paragraphs[-1]) and paragraphs[-1][0][0] == "•"
            if line.strip() == ".":
                paragraphs.append([])
            elif bullet:
                paragraphs.append(["• " + bullet[1]])
            elif line.startswith("  ") and not in_list:
                paragraphs.append([line])  # Two spaces mark a line of its own.
            else:
                paragraphs[-1].append(line)
        lines = [tidy(" ".join(paragraph)) for paragraph in paragraphs]
        yield {"document": "\n".join(line for line in lines if line), "summary": tidy(summary),
               "source": "description", "name": name}


# ------------------------------------------------------------------------------------------------
# Manual pages

# roff's names of characters, as these pages use them. Other names are dropped.
SPECIAL = (
    "bu • co © rg ® R ® em — en – hy - mi - lq “ rq ” L\" “ R\" ” oq ‘ cq ’ aq ' Aq ' dq \" "
    "ga ` ha ^ ti ~ rs \\ lB [ rB ] Fo « Fc » +- ± >= ≥ oe œ sc §").split()
SPECIAL = dict(zip(SPECIAL[::2], SPECIAL[1::2]))
ACCENT = {"'": "\u0301", "`": "\u0300", "^": "\u0302", ":": "\u0308", ",": "\u0327", "~": "\u0303"}
OTHER = {"-": "-", "e": "\\", "\\": "\\", "'": "'", "`": "`", ".": ".",
         " ": " ", "~": " ", "0": " ", "t": " "}
ESCAPE = re.compile(r"""
    \\(?:f(?:\[[^]]*\]|\(..|.) | s(?:\[[^]]*\]|\(..|[-+]?\d{1,2}) | m\[[^]]*\]
      | n[-+]?(?:\[[^]]*\]|\(..|.))                                      # fonts, numbers: dropped
    | \\\*?(?:\[(?P<long>[^]]*)\] | \((?P<two>..)) | \\\*(?P<one>.)     # a named character
    | \\(?P<other>.)""", re.VERBOSE)
MACRO = re.compile(r"[.'][ \t]*(\S*)[ \t]*(.*)")
ARGUMENT = re.compile(r'"((?:[^"]|"")*)"?|((?:\\.|[^\s\\])+)')  # quoted or bare
ONE_FONT = ("B", "I", "SM")
TWO_FONTS = ("BR", "IR", "RB", "RI", "BI", "IB")
BREAK = ("PP", "P", "LP", "TP", "TQ", "IP", "HP", "RS", "RE", "br", "sp", "nf", "fi", "Sp")
# Sections without content of their own: authors, translators, and tables that every page repeats.
UNWANTED = re.compile(r"^nom$|traduct|copyright|auteur|voir aussi|attributs|bibliothèque|"
                      r"signaler|licence|remerciement|droits|async|adresse|author", re.I)


def unescape(text):
    """Replace roff's escapes by characters: `\\(bu \\fBn'\\('etait\\fP` -> `• n'était`."""
    def character(match):
        name = match["long"] or match["two"] or match["one"]
        if name is None:
            return OTHER.get(match["other"], "")
        if len(name) == 2 and name[0] in ACCENT:
            return name[1] + ACCENT[name[0]]
        return SPECIAL.get(name, "")
    return ESCAPE.sub(character, text)


class ManualPage:
    """The sections of a manual page written with roff's man macros, as [title, paragraphs]."""

    def __init__(self, source):
        self.sections = [["", []]]
        self.parts = []            # pieces of the current paragraph
        self.expects_term = False  # whether the next line is the term of a definition list
        self.verbatim = False      # whether each line is a paragraph
        hidden = False             # inside a listing, a table or a macro definition
        source = re.sub(r"(?m)\\[\"#].*$|^[.']\s*\\\".*\n", "", source)  # comments
        source = source.replace("\\\n", "")
        for line in source[source.find("\n.SH"):].splitlines():
            macro, rest = None, line
            if line[:1] in (".", "'"):
                macro, rest = MACRO.match(line).groups()
            if macro in ("EX", "Vb", "TS", "de"):
                hidden = True
            elif macro in ("EE", "Ve", "TE", "."):
                hidden = False
            elif hidden:
                continue
            elif macro is None and rest.strip():
                self.add(rest)
            elif macro is None:
                self.flush()
            else:
                words = [quoted.replace('""', '"') or bare
                         for quoted, bare in ARGUMENT.findall(rest)]
                self.read_macro(macro, words)
        self.flush()

    def read_macro(self, macro, words):
        """Interpret a macro; those not named here are ignored."""
        if macro == "SH":
            self.flush()
            self.sections.append([tidy(unescape(" ".join(words))), []])
        elif macro == "SS":
            self.flush()
            self.sections[-1][1].append(tidy(unescape(" ".join(words))))
        elif macro in ONE_FONT:
            self.add(" ".join(words))
        elif macro in TWO_FONTS:
            self.add("".join(words))  # The fonts alternate, without spaces: .BR ls (1) -> ls(1)
        elif macro in ("UE", "ME") and self.parts:
            self.parts[-1] += "".join(words)  # the punctuation after a link
        elif macro == "SY":
            self.parts.append(" ".join(words))
        elif macro == "OP":
            self.parts.append(f"[{' '.join(words)}]")
        elif macro in BREAK:
            self.flush()
            if macro == "IP" and words:
                self.add_mark(unescape(words[0]).strip())
        if macro in ("SH", "SS") or macro in BREAK:
            self.expects_term = macro in ("TP", "TQ")
        if macro in ("nf", "fi", "SH", "SS", "TP", "IP"):
            self.verbatim = macro == "nf"

    def add(self, text):
        """Add a line of text to the current paragraph."""
        self.parts.append(text)
        if self.expects_term:
            self.parts.append(":")
            self.expects_term = False
        if self.verbatim:
            self.flush()

    def add_mark(self, mark):
        """Add the bullet, number or term before an indented paragraph."""
        if mark and mark in "•-*o+·":
            self.parts.append("•")
        elif mark:
            self.parts.append(mark if mark[-1] in ".)" else mark + " :")

    def flush(self):
        """Close the current paragraph."""
        text = tidy(unescape(" ".join(self.parts)))
        if text.strip("• :"):
            self.sections[-1][1].append(text)
        self.parts = []


def manual_pair(path, source):
    """Return the pair of a manual page, or None if it has no NOM section with a summary."""
    sections = ManualPage(source).sections
    name = next((lines[0] for title, lines in sections if title.lower() == "nom" and lines), "")
    parts = re.split(r"\s+[-–—]+\s+", name, maxsplit=1)  # "ls - Afficher le contenu"
    if len(parts) == 1:
        return None
    document = []
    for title, lines in sections:
        lines = [line for line in lines if frenchness(line) >= 0]
        if lines and not UNWANTED.search(title):
            document += [title, *lines] if title else lines
    return {"document": "\n".join(document), "summary": parts[1].rstrip(" ."),
            "source": "manual", "name": path.rpartition("/")[2].split(".")[0]}


# ------------------------------------------------------------------------------------------------
# HTML and XML


class Page(html.parser.HTMLParser):
    """The paragraphs of a page, in `lines`, without navigation, listings and legal notices."""

    BLOCK = set("""p li h1 h2 h3 h4 h5 h6 title para td th tr dt dd div br section sect1 sect2 sect3
        item desc term entry table listitem note tip body page ul ol dl figure blockquote
        """.split())
    DROPPED = set("""head script nav header footer aside pre screen programlisting info
        bookinfo articleinfo legalnotice indexterm button form""".split())
    DROPPED_CLASS = set("""navheader navfooter docnav toc toplang bottomlang sphinxsidebar
        related headerlink footer legalnotice indexterm highlight programlisting revhistory
        """.split())

    def __init__(self, source):
        super().__init__()
        self.lines = []
        self.parts = []       # pieces of the current paragraph
        self.dropping = None  # tag of the element being dropped
        self.depth = 0        # number of open elements with that tag
        # Join menu paths: <gui>Insertion</gui><gui>Filet</gui> -> Insertion > Filet
        self.feed(re.sub(r"</gui\w*>\s*<gui\w*[^>]*>", " > ", source))
        self.close()
        self.flush()

    def flush(self):
        """Close the current paragraph."""
        # Replace an entity that the document defines by its name: &konqueror; -> konqueror
        text = tidy(re.sub(r"&([\w.-]+);", r"\1", "".join(self.parts)))
        if text:
            self.lines.append(text)
        self.parts = []

    def handle_starttag(self, tag, attributes):
        classes = (dict(attributes).get("class") or "").split()
        if self.dropping:
            self.depth += tag == self.dropping
        elif tag in self.DROPPED or self.DROPPED_CLASS.intersection(classes):
            self.dropping = tag
            self.depth = 1
        elif tag in self.BLOCK:
            self.flush()

    def handle_endtag(self, tag):
        if self.dropping == tag:
            self.depth -= 1
            if self.depth == 0:
                self.dropping = None
        elif tag in self.BLOCK and not self.dropping:
            self.flush()

    def handle_data(self, data):
        if not self.dropping:
            self.parts.append(data)


# ------------------------------------------------------------------------------------------------
# Selection

PREFIX = re.compile(r"(lib(rust-)?|python3?-|node-|r-(cran|bioc)-|golang-(git(hub|lab)(-com)?-)?|"
                    r"ruby-|fonts-|task-|haskell-|ghc-|php\d?-|elpa-|texlive-|gir1\.2-|xfonts-)+")


def family_of(name):
    """Return what related packages share: libfoobar-dev and python3-foobar -> fooba."""
    return re.sub(r"\W", "", PREFIX.sub("", name.lower(), count=1))[:5]


def split_of(name):
    """Assign a name to a part. A family stays together because its texts are nearly the same."""
    percent = int(hashlib.sha256(family_of(name).encode()).hexdigest(), 16) % 100
    return "test" if percent < 4 else "validation" if percent < 6 else "train"


def usable(document, summary, source):
    """Return whether the texts are French, clean and long enough."""
    if len(document) < 60 or not 8 <= len(summary) < len(document):
        return False
    if source == "description" and len(document) > 8000:  # a list of contents
        return False
    if re.search("factice|transition", summary) or re.search("Ã©|\ufffd", document):
        return False
    return frenchness(document) > 0 and frenchness(summary) >= 0


def select(candidates, part_of):
    """Return {part: usable pairs}, without repetitions; `part_of` maps a name to its part."""
    seen = set()
    starts = collections.Counter()
    families = collections.Counter()
    parts = collections.defaultdict(list)
    held_out_starts = {row["document"][:100] for row in candidates
                       if part_of(row["name"]) != "train"}
    for row in candidates:
        document, summary, part = row["document"], row["summary"], part_of(row["name"])
        start, family = document[:100], (part, family_of(row["name"]))
        # Two versions of a package often differ only in a number.
        keys = {document, letters(summary + document[:400])}
        if not usable(document, summary, row["source"]) or keys & seen:
            continue
        # The packages of a program's eighty languages read the same: five are enough.
        if starts[start] == 5:
            continue
        if part == "train" and start in held_out_starts:
            continue
        if part != "train" and families[family] == 10:
            continue
        seen |= keys
        starts[start] += 1
        families[family] += 1
        parts[part].append(row)
    return parts


def passages(document):
    """Return the letters of the whole document and of each paragraph over 50 characters."""
    return {letters(line) for line in document.split("\n") if len(line) > 50} | {letters(document)}


def without_repeats(documents):
    """Drop lines met before (menus, notices, shared paragraphs) and lines in English."""
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


# ------------------------------------------------------------------------------------------------
# Output


def train_tokenizer(lines):
    """Train a unigram model with BARThez' ids: <s> 0, <pad> 1, </s> 2, <unk> 3, <mask> last."""
    model = io.BytesIO()  # With a file name, the trainer would store that path in the model.
    sentencepiece.SentencePieceTrainer.train(
        sentence_iterator=iter(lines), model_writer=model, vocab_size=7999, model_type="unigram",
        character_coverage=0.9995, num_threads=2, shuffle_input_sentence=False,
        bos_id=0, pad_id=1, eos_id=2, unk_id=3, minloglevel=2)
    # The trainer cannot put a piece last. The model is a protobuf whose repeated field 1 holds the
    # pieces in order, so append one: {1: name, 2: score, 3: type 3 (control)}.
    piece = b"\x0a\x06<mask>" + b"\x15\0\0\0\0" + b"\x18\x03"
    model.write(b"\x0a" + bytes([len(piece)]) + piece)
    tokenizer = sentencepiece.SentencePieceProcessor(model_proto=model.getvalue())
    assert tokenizer.piece_to_id("<mask>") == len(tokenizer) - 1 == 7999
    return tokenizer


def write_lines(path, records):
    """Write one JSON object per line."""
    with open(path, "w", encoding="utf-8") as file:
        for record in records:
            file.write(json.dumps(record, ensure_ascii=False) + "\n")


def main(folder):
    index, later, debs = fetch(folder / "apt")

    described = list(descriptions(index))
    manuals = []
    pages = []
    for deb in debs.values():
        for path, text in french_files(deb):
            if "/man/" not in path:
                pages.append("\n".join(Page(text).lines))
            elif pair := manual_pair(path, text):
                manuals.append(pair)
    parts = select(described + manuals, split_of)

    # A fresh pair has a new name and shares no passage with the texts of Debian 12.
    names = {row["name"] for row in described}
    known = set()
    for document in [row["document"] for row in described + manuals] + pages:
        known |= passages(document)
    fresh = [row for row in descriptions(later)
             if row["name"] not in names and not passages(row["document"]) & known]
    parts |= select(fresh, lambda name: "fresh")

    pretrain = list(without_repeats([row["document"] for row in parts["train"]] + pages))
    random.Random(0).shuffle(pretrain)
    for part, rows in parts.items():
        write_lines(folder / f"pairs.{part}.jsonl", rows)
    write_lines(folder / "pretrain.jsonl", ({"document": document} for document in pretrain))

    lines = [line for document in pretrain for line in document.split("\n")]
    lines += [row["summary"] for row in parts["train"]]
    # Sample here with a fixed seed: the trainer's own sampling differs from run to run.
    tokenizer = train_tokenizer(random.Random(0).sample(lines, min(len(lines), 150_000)))
    (folder / "sentencepiece.bpe.model").write_bytes(tokenizer.serialized_model_proto())

    pairs = collections.Counter(f"{part} {row['source']}" for part in parts for row in parts[part])
    stats = {"pairs": dict(sorted(pairs.items())),
             "pretrain": {"documents": len(pretrain), "characters": sum(map(len, pretrain)),
                          "tokens": sum(map(len, tokenizer.encode(pretrain)))}}
    print(json.dumps(stats, indent=1))
    # File names are package_version_architecture.deb; %3a is an escaped colon.
    stats["packages"] = {package: deb.name.split("_")[1].replace("%3a", ":")
                         for package, deb in debs.items()}
    (folder / "stats.json").write_text(json.dumps(stats, indent=1) + "\n")


if __name__ == "__main__":
    parser = argparse.ArgumentParser(description=__doc__.partition("\n")[0])
    parser.add_argument("folder", type=pathlib.Path, help="where to write and keep downloads")
    try:
        main(parser.parse_args().folder.absolute())
    except (OSError, subprocess.CalledProcessError) as error:
        print(f"data.py: {error}", file=sys.stderr)
        sys.exit(2)
