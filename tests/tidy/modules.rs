//! The imports between the files of a crate, as far as paths show them: `use` declarations and paths in expressions.
//!
//! Paths are followed through re-exports to the file that defines the name. Declaring or re-exporting a child module
//! is no import; neither is a method call. Test modules are left out, and so are programs in `src/bin/`, which nothing
//! can import.

use std::collections::{BTreeMap, BTreeSet};

use super::Source;

/// The maximum length of a chain of re-exports.
const MAX_REEXPORTS: usize = 8;

/// A path that leads from one file of a crate to another one.
#[derive(Debug, Clone, PartialEq, Eq, PartialOrd, Ord)]
pub struct Import {
    /// The file with the path.
    pub from: String,
    /// The file that defines the name.
    pub to: String,
    /// The path, `crate::a::B`.
    pub path: String,
}

/// The module that a file holds.
#[derive(Default)]
struct Module {
    file: String,
    uses: Vec<Use>,
    /// The paths outside of `use` declarations.
    paths: Vec<Vec<String>>,
    defines: BTreeSet<String>,
    /// The names of `mod name;` below `#[cfg(test)]`.
    test_children: BTreeSet<String>,
}

/// One name that a `use` declaration brings in.
struct Use {
    path: Vec<String>,
    /// The name in this module; `None` for a glob.
    name: Option<String>,
    public: bool,
}

/// Returns the imports between the files of each crate, by the directory of the crate.
pub fn imports_by_crate(sources: &[Source]) -> BTreeMap<String, BTreeSet<Import>> {
    let mut crates: BTreeMap<String, BTreeMap<Vec<String>, Module>> = BTreeMap::new();
    for source in sources {
        let Some((root, inside)) = source.path.split_once("/src/") else { continue };
        if inside.starts_with("bin/") {
            continue;
        }
        let mut path: Vec<String> = inside.trim_end_matches(".rs").split('/').map(str::to_owned).collect();
        if path.last().is_some_and(|last| last == "mod")
            || matches!(path[..], [ref only] if only == "lib" || only == "main")
        {
            path.pop();
        }
        // Of `lib.rs` and `main.rs` the library is the one that other files can import from.
        if path.is_empty() && inside == "main.rs" && crates.get(root).is_some_and(|c| c.contains_key(&path)) {
            continue;
        }
        crates.entry(root.to_owned()).or_default().insert(path, read_module(source));
    }
    crates.into_iter().map(|(root, modules)| (root, Resolver { modules: &modules }.imports())).collect()
}

/// Lists the groups of files that import each other in a circle, with the imports inside each group.
pub fn cycles(imports: &BTreeSet<Import>) -> Vec<(BTreeSet<String>, Vec<&Import>)> {
    let mut next: BTreeMap<&str, BTreeSet<&str>> = BTreeMap::new();
    for import in imports {
        next.entry(&import.from).or_default().insert(&import.to);
    }
    let mut reached: BTreeMap<&str, BTreeSet<&str>> = BTreeMap::new();
    for file in next.keys() {
        let files = reached.entry(file).or_default();
        let mut open = vec![*file];
        while let Some(file) = open.pop() {
            open.extend(next.get(file).into_iter().flatten().filter(|to| files.insert(**to)));
        }
    }
    let mut groups = BTreeSet::new();
    for (file, to) in &reached {
        let group: BTreeSet<String> = to
            .iter()
            .filter(|other| reached.get(*other).is_some_and(|back| back.contains(file)))
            .map(|other| (*other).to_owned())
            .collect();
        if !group.is_empty() {
            groups.insert(group);
        }
    }
    let inside = |group: &BTreeSet<String>| {
        imports.iter().filter(|import| group.contains(&import.from) && group.contains(&import.to)).collect()
    };
    groups.into_iter().map(|group| (group.clone(), inside(&group))).collect()
}

struct Resolver<'a> {
    modules: &'a BTreeMap<Vec<String>, Module>,
}

/// The target of a path.
enum Target<'a> {
    Module(Vec<String>),
    /// A name that is defined in this file.
    ItemOf(&'a str),
}

impl Resolver<'_> {
    fn imports(&self) -> BTreeSet<Import> {
        let mut imports = BTreeSet::new();
        for (here, module) in self.modules {
            if self.is_test(here) {
                continue;
            }
            let mut add = |path: &[String], target: Option<Target>| {
                if let Some(Target::ItemOf(file)) = target
                    && file != module.file
                {
                    imports.insert(Import { from: module.file.clone(), to: file.to_owned(), path: path.join("::") });
                }
            };
            for used in &module.uses {
                let target = self.resolve_from(here, &used.path, 0);
                match (&used.name, target) {
                    (None, Some(Target::Module(whole))) if !(used.public && whole.starts_with(here)) => {
                        add(&used.path, self.modules.get(&whole).map(|m| Target::ItemOf(&m.file)));
                    }
                    (Some(_), Some(target)) if !(used.public && self.is_child(here, &used.path)) => {
                        add(&used.path, Some(target));
                    }
                    _ => {}
                }
            }
            for path in &module.paths {
                add(path, self.resolve_from(here, path, 0));
            }
        }
        imports
    }

    fn is_test(&self, module: &[String]) -> bool {
        (0..module.len()).any(|depth| {
            self.modules.get(&module[..depth]).is_some_and(|parent| parent.test_children.contains(&module[depth]))
        })
    }

    /// Says whether a path in a module leads into one of its own children.
    fn is_child(&self, here: &[String], path: &[String]) -> bool {
        let path = path.strip_prefix(&["self".to_owned()]).unwrap_or(path);
        path.first().is_some_and(|first| self.modules.contains_key(&child(here, first)))
    }

    /// Follows a path as it is written in the module `here`.
    fn resolve_from(&self, here: &[String], path: &[String], hops: usize) -> Option<Target<'_>> {
        let (first, rest) = path.split_first()?;
        match first.as_str() {
            "crate" => self.resolve(&[], rest, hops),
            "self" => self.resolve(here, rest, hops),
            "super" => {
                let mut parent = &here[..here.len().checked_sub(1)?];
                let mut rest = rest;
                while let Some((first, more)) = rest.split_first()
                    && first == "super"
                {
                    (parent, rest) = (&parent[..parent.len().checked_sub(1)?], more);
                }
                self.resolve(parent, rest, hops)
            }
            _ if self.modules.contains_key(&child(here, first)) => self.resolve(here, path, hops),
            name => {
                let module = self.modules.get(here)?;
                let used = module.uses.iter().find(|used| used.name.as_deref() == Some(name))?;
                // `use serde;` names a package, not itself.
                if used.path.first() == Some(first) || hops > MAX_REEXPORTS {
                    return None;
                }
                match self.resolve_from(here, &used.path, hops + 1)? {
                    Target::Module(module) => self.resolve(&module, rest, hops + 1),
                    item @ Target::ItemOf(_) => Some(item),
                }
            }
        }
    }

    /// Follows a path from a module downward, and through what the module re-exports.
    fn resolve(&self, module: &[String], path: &[String], hops: usize) -> Option<Target<'_>> {
        let Some((first, rest)) = path.split_first() else { return Some(Target::Module(module.to_owned())) };
        let below = child(module, first);
        if self.modules.contains_key(&below) {
            return self.resolve(&below, rest, hops);
        }
        let here = self.modules.get(module)?;
        if !here.defines.contains(first) && hops <= MAX_REEXPORTS {
            for used in here.uses.iter().filter(|used| used.name.as_ref().is_none_or(|name| name == first)) {
                let target = self.resolve_from(module, &used.path, hops + 1);
                match (&used.name, target) {
                    (Some(_), Some(Target::Module(module))) => return self.resolve(&module, rest, hops + 1),
                    (Some(_), Some(item)) => return Some(item),
                    (None, Some(Target::Module(other))) if self.defines(&other, first) => {
                        return self.resolve(&other, path, hops + 1);
                    }
                    _ => {}
                }
            }
        }
        Some(Target::ItemOf(&here.file))
    }

    fn defines(&self, module: &[String], name: &str) -> bool {
        self.modules.get(module).is_some_and(|module| {
            module.defines.contains(name) || module.uses.iter().any(|used| used.name.as_deref() == Some(name))
        })
    }
}

fn child(module: &[String], name: &str) -> Vec<String> {
    module.iter().cloned().chain([name.to_owned()]).collect()
}

fn read_module(source: &Source) -> Module {
    let code = source.shipped();
    let tokens = tokens(code);
    let mut module = Module { file: source.path.clone(), ..Module::default() };
    let mut inline_modules: Vec<usize> = Vec::new();
    let (mut depth, mut at) = (0_usize, 0);
    while at < tokens.len() {
        let before = at.checked_sub(1).map_or("", |before| tokens[before]);
        match tokens[at] {
            "use" => {
                let public = before == "pub" || before == ")";
                let end = tokens[at..].iter().position(|token| *token == ";").map_or(tokens.len(), |end| at + end);
                let mut found = Vec::new();
                use_tree(&tokens[at + 1..end], &mut Vec::new(), &mut found);
                module.uses.extend(found.into_iter().map(|(path, name)| {
                    let path = outside(path, inline_modules.len());
                    Use { path, name, public }
                }));
                at = end;
            }
            "mod" => match (tokens.get(at + 1), tokens.get(at + 2)) {
                (Some(name), Some(&";")) if is_below_cfg_test(&tokens[..at]) => {
                    module.test_children.insert((*name).to_owned());
                }
                (Some(_), Some(&"{")) => inline_modules.push(depth),
                _ => {}
            },
            "struct" | "enum" | "trait" | "type" | "fn" | "const" | "static" | "union" => {
                module.defines.extend(tokens.get(at + 1).map(|name| (*name).to_owned()));
            }
            "{" => depth += 1,
            "}" => {
                depth = depth.saturating_sub(1);
                if inline_modules.last() == Some(&depth) {
                    inline_modules.pop();
                }
            }
            word if is_name(word) && before != "::" && before != "." && tokens.get(at + 1) == Some(&"::") => {
                let mut path = vec![word.to_owned()];
                while let (Some(&"::"), Some(next)) = (tokens.get(at + 1), tokens.get(at + 2))
                    && is_name(next)
                {
                    path.push((*next).to_owned());
                    at += 2;
                }
                module.paths.push(outside(path, inline_modules.len()));
            }
            _ => {}
        }
        at += 1;
    }
    module
}

/// Removes the leading steps of a path that only leave modules inside the file.
fn outside(mut path: Vec<String>, inline_modules: usize) -> Vec<String> {
    for _ in 0..inline_modules {
        if path.len() > 1 && path[0] == "super" {
            path.remove(0);
            if path[0] != "super" {
                path.insert(0, "self".into());
            }
        }
    }
    path
}

/// Reads a `use` tree: `a::{b, c as d, e::*}`.
fn use_tree(tokens: &[&str], prefix: &mut Vec<String>, found: &mut Vec<(Vec<String>, Option<String>)>) {
    let depth = prefix.len();
    let mut at = 0;
    while let Some(token) = tokens.get(at) {
        match *token {
            "{" => {
                let end = closing(tokens, at);
                let mut start = at + 1;
                let mut nested = 0_usize;
                for (i, token) in tokens[..end].iter().enumerate().skip(at + 1) {
                    match *token {
                        "{" => nested += 1,
                        "}" => nested -= 1,
                        "," if nested == 0 => {
                            use_tree(&tokens[start..i], prefix, found);
                            start = i + 1;
                        }
                        _ => {}
                    }
                }
                use_tree(&tokens[start..end], prefix, found);
                prefix.truncate(depth);
                return;
            }
            "*" => {
                found.push((prefix.clone(), None));
                prefix.truncate(depth);
                return;
            }
            "as" => {
                let name = tokens.get(at + 1).map(|name| (*name).to_owned());
                found.push((prefix.clone(), name.or(Some("_".into()))));
                prefix.truncate(depth);
                return;
            }
            // `{self}` names the module of the group itself.
            "self" if !prefix.is_empty() => {}
            word if is_name(word) => prefix.push(word.to_owned()),
            _ => {}
        }
        at += 1;
    }
    if !tokens.is_empty() {
        found.push((prefix.clone(), prefix.last().cloned()));
    }
    prefix.truncate(depth);
}

fn closing(tokens: &[&str], open: usize) -> usize {
    let mut depth = 0_usize;
    for (at, token) in tokens.iter().enumerate().skip(open) {
        match *token {
            "{" => depth += 1,
            "}" if depth == 1 => return at,
            "}" => depth -= 1,
            _ => {}
        }
    }
    tokens.len()
}

/// Says whether the attributes before an item's `mod` (and its `pub`) hold `#[cfg(test)]`.
fn is_below_cfg_test(before: &[&str]) -> bool {
    let item = before.iter().rposition(|token| matches!(*token, ";" | "{" | "}")).map_or(0, |end| end + 1);
    before[item..].windows(6).any(|window| window == ["#", "[", "cfg", "(", "test", ")"])
}

/// Splits code without comments and literals into words, `::` and single characters.
fn tokens(code: &str) -> Vec<&str> {
    let mut tokens = Vec::new();
    let mut rest = code.trim_start();
    while let Some(first) = rest.chars().next() {
        let word = rest.find(|c: char| c != '_' && !c.is_alphanumeric()).unwrap_or(rest.len());
        let length = if word > 0 {
            word
        } else if rest.starts_with("::") {
            2
        } else {
            first.len_utf8()
        };
        tokens.push(&rest[..length]);
        rest = rest[length..].trim_start();
    }
    tokens
}

fn is_name(token: &str) -> bool {
    token.chars().next().is_some_and(|first| first == '_' || first.is_alphabetic())
}

#[cfg(test)]
mod tests {
    use super::*;

    fn imports(files: &[(&str, &str)]) -> Vec<(String, String)> {
        let sources: Vec<Source> = files
            .iter()
            .map(|(path, text)| Source { path: format!("x/src/{path}"), text: (*text).into(), code: (*text).into() })
            .collect();
        let short = |path: &str| path.strip_prefix("x/src/").expect("of the crate").trim_end_matches(".rs").to_owned();
        let found = imports_by_crate(&sources).remove("x").expect("a crate");
        let pairs: BTreeSet<_> = found.iter().map(|import| (short(&import.from), short(&import.to))).collect();
        pairs.into_iter().collect()
    }

    fn pair(from: &str, to: &str) -> (String, String) {
        (from.into(), to.into())
    }

    #[test]
    fn paths_lead_to_the_file_that_defines_the_name() {
        let files = [
            ("lib.rs", "mod a; mod b; pub use b::deep::Deep;"),
            ("a.rs", "use crate::{Deep, b::{self, Wide as W}}; fn f() { b::g(); super::b::deep::h::<u8>(); }"),
            ("b/mod.rs", "mod deep; pub use deep::*; pub struct Wide; pub fn g() {}"),
            ("b/deep.rs", "pub struct Deep; pub fn h() {} mod inside { use super::Deep; }"),
        ];
        assert_eq!(imports(&files), [pair("a", "b/deep"), pair("a", "b/mod")]);
    }

    #[test]
    fn a_parent_that_uses_its_child_imports_it_and_one_that_declares_it_does_not() {
        let files = [
            ("main.rs", "mod a; mod b; fn main() { a::run(); }"),
            ("a.rs", "use super::b::{Two, one}; pub fn run() { std::fs::read(); }"),
            ("b/mod.rs", "pub mod c; use c::Two; pub fn one() {}"),
            ("b/c.rs", "use super::one; pub struct Two;"),
        ];
        let all = [pair("a", "b/c"), pair("a", "b/mod"), pair("b/c", "b/mod"), pair("b/mod", "b/c"), pair("main", "a")];
        assert_eq!(imports(&files), all);
    }

    #[test]
    fn test_modules_are_left_out() {
        let files = [
            ("lib.rs", "mod a;\n#[cfg(test)]\nmod a_test; mod c;"),
            ("a.rs", "use crate::c::C;\n#[cfg(test)]\nmod tests {\n use crate::a_test::x;\n}\n"),
            ("a_test.rs", "use super::a::A; pub fn x() {}"),
            ("c.rs", "pub struct C;"),
        ];
        assert_eq!(imports(&files), [pair("a", "c")]);
    }

    #[test]
    fn files_in_a_circle_are_one_group() {
        let import = |(from, to): &(&str, &str)| Import { from: (*from).into(), to: (*to).into(), path: String::new() };
        let imports =
            [("a", "b"), ("b", "c"), ("c", "a"), ("c", "d"), ("d", "e"), ("e", "d"), ("f", "a")].iter().map(import);
        let imports: BTreeSet<Import> = imports.collect();
        let groups: Vec<Vec<String>> =
            cycles(&imports).into_iter().map(|(files, _)| files.into_iter().collect()).collect();
        assert_eq!(groups, [vec!["a", "b", "c"], vec!["d", "e"]]);
    }
}
