//! Rules of the repository that the compiler does not check: imports between packages and modules, places of `unsafe`,
//! sizes of files, names.
//!
//! Each rule is one test that lists all violations. A wrong rule is changed here, together with ARCHITECTURE.md.

mod cycles;
mod modules;
mod names;
mod rust_text;

use std::fs;
use std::path::{Path, PathBuf};

use rust_text::{code_only, find_word, paths_after, without_tests};

/// The top-level modules of the daemon. A module imports modules later in the list only.
const DAEMON_MODULES: &[&str] = &[
    "bin",
    "server",
    "socket",
    "auth",
    "recovery",
    "pressure",
    "project",
    "operations",
    "services",
    "store",
    "tokens",
    "load",
    "plugins",
    "shims",
    "profile",
    "config",
    "hashing",
    "errors",
];

/// A package of the workspace.
struct Package {
    /// Its directory from the root of the repository. That of `plugins` holds a package per plugin.
    dir: &'static str,
    /// The directories of the packages it may depend on.
    uses: &'static [&'static str],
}

const PACKAGES: &[Package] = &[
    Package { dir: "crates/failpoint", uses: &[] },
    Package { dir: "crates/protocol", uses: &[] },
    Package { dir: "crates/os", uses: &[] },
    Package { dir: "plugin-api", uses: &[] },
    Package { dir: "crates/core", uses: &["crates/protocol"] },
    Package { dir: "crates/history", uses: &["crates/failpoint", "crates/protocol", "crates/os"] },
    Package { dir: "crates/shim", uses: &["crates/failpoint", "crates/protocol", "crates/os"] },
    Package { dir: "ctl", uses: &["crates/protocol"] },
    Package {
        dir: "daemon",
        uses: &[
            "crates/failpoint",
            "crates/protocol",
            "crates/os",
            "crates/core",
            "crates/history",
            "crates/shim",
            "plugin-api",
        ],
    },
    Package { dir: "plugins", uses: &["plugin-api"] },
];

impl Package {
    /// The name without `fermata-`, which is that of its directory.
    fn name(&self) -> &'static str {
        self.dir.rsplit('/').next().unwrap_or(self.dir)
    }

    /// Lists the names of the packages that it must not depend on.
    fn forbidden(&self) -> impl Iterator<Item = &'static str> {
        PACKAGES.iter().filter(|p| p.dir != self.dir && !self.uses.contains(&p.dir)).map(Package::name)
    }
}

/// What the pure domain must not use: clock, files, randomness and environment are parameters.
const IMPURE: &[&str] =
    &["tokio", "rusqlite", "rand", "getrandom", "tracing", "SystemTime", "Instant", "println", "eprintln"];

/// The same, by module of the standard library.
const IMPURE_STD: &[&str] = &["fs", "env", "net", "process", "thread", "os"];

/// The files that may contain `unsafe`. A path that ends with a slash is a directory.
const UNSAFE_HOMES: &[&str] = &["crates/os/", "daemon/src/plugins/loader.rs", "plugin-api/", "plugins/"];

/// File names that do not tell what the file is about.
const EMPTY_NAMES: &[&str] = &["utils", "util", "helpers", "helper", "manager", "imp", "common", "misc"];

const MAX_LINES: usize = 600;
const MAX_ARCHITECTURE_LINES: usize = 300;

/// A Rust file of the repository.
struct Source {
    /// Its path from the root of the repository.
    path: String,
    /// Its text.
    text: String,
    /// Its text without comments and literals.
    code: String,
}

impl Source {
    /// Returns the code without its test module.
    fn shipped(&self) -> &str {
        // Blanking keeps line breaks, so the cut by lines is the same in both texts.
        without_tests(&self.code)
    }

    /// Says whether the whole file contains only tests.
    fn is_test(&self) -> bool {
        let name = self.path.rsplit('/').next().unwrap_or(&self.path).trim_end_matches(".rs");
        self.path.split('/').any(|part| part == "tests")
            || name == "tests"
            || name.ends_with("_test")
            || name.ends_with("_tests")
    }

    /// Returns the top-level module of the daemon that the file belongs to; `None` outside the daemon.
    fn daemon_module(&self) -> Option<&str> {
        let inside = self.path.strip_prefix("daemon/src/")?;
        let first = inside.split('/').next()?;
        Some(first.strip_suffix(".rs").unwrap_or(first))
    }
}

fn root() -> PathBuf {
    Path::new(env!("CARGO_MANIFEST_DIR")).parent().expect("the tests package lies in the root").to_owned()
}

fn sources() -> Vec<Source> {
    let root = root();
    let mut directories: Vec<PathBuf> =
        PACKAGES.iter().map(|package| root.join(package.dir)).chain([root.join("tests")]).collect();
    let mut found = Vec::new();
    while let Some(directory) = directories.pop() {
        let entries = fs::read_dir(&directory).unwrap_or_else(|e| panic!("read {}: {e}", directory.display()));
        for entry in entries {
            let path = entry.expect("read a directory entry").path();
            if path.is_dir() {
                directories.push(path);
            } else if path.extension().is_some_and(|extension| extension == "rs") {
                let text = fs::read_to_string(&path).unwrap_or_else(|e| panic!("read {}: {e}", path.display()));
                let path = path.strip_prefix(&root).expect("found below the root").to_string_lossy().into_owned();
                let code = code_only(&text);
                found.push(Source { path, text, code });
            }
        }
    }
    assert!(found.len() > 20, "the tidy test reads the wrong directory: {} files", found.len());
    found.sort_by(|a, b| a.path.cmp(&b.path));
    found
}

/// Fails with one line per violation, if there are any.
#[track_caller]
fn no_faults(faults: Vec<String>, rule: &str) {
    assert!(faults.is_empty(), "{rule}:\n  {}", faults.join("\n  "));
}

#[test]
fn packages_import_one_way() {
    let mut faults = Vec::new();
    let all = sources();
    for package in PACKAGES {
        let inside = format!("{}/", package.dir);
        for other in package.forbidden() {
            let name = format!("fermata_{}", other.replace('-', "_"));
            for source in all.iter().filter(|source| source.path.starts_with(&inside)) {
                if let Some(line) = find_word(&source.code, &name, "") {
                    faults.push(format!("{}:{line} uses {name}", source.path));
                }
            }
            let manifest = root().join(package.dir).join("Cargo.toml");
            if package.dir == "plugins" {
                continue;
            }
            let manifest = fs::read_to_string(manifest).expect("read a Cargo.toml");
            if manifest.lines().any(|line| line.starts_with(&format!("fermata-{other}"))) {
                faults.push(format!("{}/Cargo.toml depends on fermata-{other}", package.dir));
            }
        }
    }
    no_faults(faults, "packages import each other along the list of packages only");
}

#[test]
fn the_shim_has_no_async_runtime() {
    let manifest = fs::read_to_string(root().join("crates/shim/Cargo.toml")).expect("read the shim's Cargo.toml");
    let faults = manifest.lines().filter(|line| line.contains("tokio")).map(str::to_owned).collect();
    no_faults(faults, "the shim has one thread and waits for nothing: crates/shim/Cargo.toml names no tokio");
}

#[test]
fn the_core_is_pure() {
    let mut faults = Vec::new();
    for source in sources().iter().filter(|s| s.path.starts_with("crates/core/src/")) {
        for impure in IMPURE {
            if let Some(line) = find_word(source.shipped(), impure, "") {
                faults.push(format!("{}:{line} uses {impure}", source.path));
            }
        }
        for (module, line) in paths_after(source.shipped(), "std::") {
            if IMPURE_STD.contains(&module.as_str()) {
                faults.push(format!("{}:{line} uses std::{module}", source.path));
            }
        }
    }
    no_faults(faults, "core has no clock, files, randomness, environment, runtime or logger: they are parameters");
}

#[test]
fn modules_of_the_daemon_import_downward() {
    let rank = |module: &str| DAEMON_MODULES.iter().position(|m| *m == module);
    let mut faults = Vec::new();
    for source in sources() {
        let Some(module) = source.daemon_module().filter(|module| *module != "lib") else { continue };
        let Some(own) = rank(module) else {
            faults.push(format!("{}: the module '{module}' is not in DAEMON_MODULES", source.path));
            continue;
        };
        let mut used = paths_after(source.shipped(), "crate::");
        used.extend(paths_after(source.shipped(), "fermata_daemon::"));
        // In a nested module `super` leads to a module inside the top-level one.
        let inside = source.path.trim_start_matches("daemon/src/").trim_end_matches("/mod.rs");
        if !inside.contains('/') {
            used.extend(paths_after(source.shipped(), "super::"));
        }
        for (name, line) in used {
            if rank(&name).is_some_and(|other| other < own) {
                faults.push(format!("{}:{line}: '{module}' imports '{name}', which is above it", source.path));
            }
        }
    }
    no_faults(faults, &format!("inside the daemon imports run downward: {}", DAEMON_MODULES.join(" > ")));
}

#[test]
fn the_architecture_names_every_module_of_the_daemon_and_stays_short() {
    let text = fs::read_to_string(root().join("ARCHITECTURE.md")).expect("read ARCHITECTURE.md");
    let mut faults = Vec::new();
    let lines = text.lines().count();
    if lines >= MAX_ARCHITECTURE_LINES {
        faults.push(format!("it has {lines} lines, and {MAX_ARCHITECTURE_LINES} are too many"));
    }
    faults.extend(
        DAEMON_MODULES
            .iter()
            .filter(|module| find_word(&text, module, "").is_none())
            .map(|m| format!("'{m}' is missing")),
    );
    no_faults(faults, "ARCHITECTURE.md");
}

/// Documents that name files and directories of the repository.
const DOCUMENTS: &[&str] = &["ARCHITECTURE.md", "CONTRIBUTING.md", "README.md"];

/// The directories that a path in a document begins with.
const PATH_ROOTS: &[&str] = &[
    "crates/",
    "daemon/",
    "ctl/",
    "plugin-api/",
    "plugins/",
    "profiles/",
    "migrations/",
    "tests/",
    "scripts/",
    "docs/",
];

#[test]
fn documents_name_paths_that_exist() {
    let root = root();
    let mut faults = Vec::new();
    let mut named = 0;
    for document in DOCUMENTS {
        let text = fs::read_to_string(root.join(document)).unwrap_or_else(|e| panic!("read {document}: {e}"));
        // Only code spans that are a path: without blanks and placeholders.
        let paths = text.split('`').skip(1).step_by(2).filter(|code| {
            let plain = code.bytes().all(|b| b.is_ascii_alphanumeric() || b"/._-".contains(&b));
            plain && PATH_ROOTS.iter().any(|first| code.starts_with(first))
        });
        for path in paths {
            named += 1;
            if !root.join(path).exists() {
                faults.push(format!("{document}: {path}"));
            }
        }
    }
    assert!(named > 20, "the rule reads the wrong files: {named} paths");
    no_faults(faults, "a document names a path that does not exist");
}

#[test]
fn unsafe_is_in_few_places_only() {
    let home = |path: &str| UNSAFE_HOMES.iter().any(|h| path == *h || (h.ends_with('/') && path.starts_with(h)));
    let faults = sources()
        .iter()
        .filter(|source| !home(&source.path))
        .filter_map(|source| Some(format!("{}:{}", source.path, find_word(&source.code, "unsafe", "")?)))
        .collect();
    no_faults(faults, &format!("'unsafe' is allowed only in {}", UNSAFE_HOMES.join(", ")));
}

#[test]
fn nothing_is_left_to_do() {
    let mut faults = Vec::new();
    for source in sources() {
        for word in ["todo", "unimplemented"] {
            if let Some(line) = find_word(&source.code, word, "!") {
                faults.push(format!("{}:{line} {word}!", source.path));
            }
        }
    }
    no_faults(faults, "no todo!() and no unimplemented!()");
}

#[test]
fn only_programs_end_the_process() {
    let program = |path: &str| {
        path.starts_with("daemon/src/bin/") || path == "crates/shim/src/main.rs" || path.starts_with("ctl/src/")
    };
    let faults = sources()
        .iter()
        .filter(|source| !program(&source.path))
        .filter_map(|source| Some(format!("{}:{}", source.path, find_word(&source.code, "process::exit", "")?)))
        .collect();
    no_faults(faults, "process::exit is allowed only in programs");
}

#[test]
fn files_are_not_too_long() {
    let mut faults = Vec::new();
    for source in sources() {
        let lines = without_tests(&source.text).lines().count();
        if lines > MAX_LINES {
            faults.push(format!("{}: {lines} lines without its tests", source.path));
        }
    }
    no_faults(faults, &format!("a file of more than {MAX_LINES} lines should be divided"));
}

#[test]
fn every_file_begins_with_a_module_comment() {
    let faults = sources().into_iter().filter(|s| !s.text.starts_with("//!")).map(|s| s.path).collect();
    no_faults(faults, "a file begins with //! and its responsibility");
}

#[test]
fn documentation_tests_stand_where_they_are_run() {
    let mut faults = Vec::new();
    for source in sources().iter().filter(|source| !source.path.starts_with("plugin-api/")) {
        let mut inside = false;
        for (number, line) in (1..).zip(source.text.lines().map(str::trim_start)) {
            let comment = line.strip_prefix("//!").or_else(|| line.strip_prefix("///"));
            let Some(fence) = comment.and_then(|comment| comment.trim().strip_prefix("```")) else { continue };
            if !inside && !["text", "toml"].contains(&fence) {
                faults.push(format!("{}:{number} ```{fence}", source.path));
            }
            inside = !inside;
        }
    }
    no_faults(faults, "scripts/test runs documentation tests of plugin-api only: mark other examples as text");
}

#[test]
fn file_names_are_not_generic() {
    let empty =
        |path: &str| path.split('/').any(|part| EMPTY_NAMES.contains(&part.strip_suffix(".rs").unwrap_or(part)));
    let faults = sources().into_iter().map(|s| s.path).filter(|path| empty(path)).collect();
    no_faults(faults, &format!("no {}", EMPTY_NAMES.join(", ")));
}

#[test]
fn migrations_are_numbered_without_gap() {
    let Ok(entries) = fs::read_dir(root().join("migrations")) else {
        return;
    };
    let mut names: Vec<String> =
        entries.flatten().map(|entry| entry.file_name().to_string_lossy().into_owned()).collect();
    names.sort();
    let mut faults = Vec::new();
    for (expected, name) in (1..).zip(&names) {
        let well_formed =
            name.strip_suffix(".sql").and_then(|stem| stem.split_once('_')).is_some_and(|(number, rest)| {
                number.len() == 4
                    && number.parse() == Ok(expected)
                    && !rest.is_empty()
                    && rest.bytes().all(|b| b == b'_' || b.is_ascii_lowercase() || b.is_ascii_digit())
            });
        if !well_formed {
            faults.push(format!("{name}, where {expected:04}_name.sql was expected"));
        }
    }
    no_faults(faults, "migrations are named NNNN_name.sql");
}

/// Returns the literals in the arguments of a call; the text begins behind its opening parenthesis.
fn literals_of(arguments: &str) -> Vec<&str> {
    let mut depth = 1;
    let mut found = Vec::new();
    let mut rest = arguments;
    while let Some(at) = rest.find(['(', ')', '"']) {
        let (mark, after) = (&rest[at..=at], &rest[at + 1..]);
        rest = after;
        match mark {
            "(" => depth += 1,
            ")" => depth -= 1,
            _ => {
                let end = after.find('"').unwrap_or(after.len());
                found.push(&after[..end]);
                rest = after.get(end + 1..).unwrap_or_default();
            }
        }
        if depth == 0 {
            break;
        }
    }
    found
}

#[test]
fn every_failpoint_is_armed_by_a_test() {
    let all = sources();
    let is_test = |path: &str| path.starts_with("tests/") || path.contains("tests");
    let mut armed = String::new();
    for source in &all {
        let tests = if is_test(&source.path) { 0 } else { without_tests(&source.text).len() };
        // The text of this rule arms no failpoint.
        if source.path != "tests/tidy/main.rs" {
            armed.push_str(&source.text[tests..]);
        }
    }
    let is_armed = |name: &str| {
        armed
            .match_indices(name)
            .any(|(at, _)| armed[..at].ends_with(['"', ',']) && armed[at + name.len()..].starts_with(['"', '=', '@']))
    };
    let mut faults = Vec::new();
    let mut names = 0;
    let shipped = |path: &str| !is_test(path) && !path.starts_with("crates/failpoint/");
    for source in all.iter().filter(|source| shipped(&source.path)) {
        let text = without_tests(&source.text);
        for call in ["failpoint(", "failpoint::hit(", "failpoint::check("] {
            for (at, _) in text.match_indices(call) {
                let (before, after) = (&text[..at], &text[at + call.len()..]);
                if before.ends_with("fn ") || after.starts_with("name)") {
                    continue;
                }
                let line = before.lines().count();
                let literals = literals_of(after);
                if literals.is_empty() {
                    faults.push(format!("{}:{line} names no failpoint at the place itself", source.path));
                }
                names += literals.len();
                let unarmed = literals.into_iter().filter(|name| !is_armed(name));
                faults.extend(unarmed.map(|name| format!("{}:{line} {name}", source.path)));
            }
        }
    }
    assert!(names > 40, "the rule reads the wrong files: {names} failpoints");
    no_faults(faults, "an instant at which no test lets the daemon die or fail is not known to be safe");
}
