//! No file of a crate imports another one that imports it, directly or through others.
//!
//! A shared type belongs into the lowest module that needs it: a type that two files pass to each other belongs into a
//! third one below both.

use std::collections::BTreeSet;

use super::modules::{Import, cycles, imports_by_crate};
use super::{no_faults, sources};

/// Files that contain a part of the `impl` of a type (file, type). The import of that type is not counted, since the
/// methods belong to the type and are split by subject.
const SPLIT_IMPLS: &[(&str, &str)] = &[
    // The project's actor: one file per kind of message.
    ("effects", "Actor"),
    ("follow_up", "Actor"),
    ("scan", "Actor"),
    ("restoring", "Actor"),
    ("retain", "Actor"),
    ("blocked", "Actor"),
    // A restore in progress: the steps that write files, and those that set attributes.
    ("staging", "Applying"),
    ("attributes", "Applying"),
    // The shim: its supervisor around the agent's hooks, its freezer when a freeze is broken.
    ("hooks", "AgentSupervisor"),
    ("refreeze", "FreezeController"),
];

/// Returns the name of the module in a file: its stem, of a `mod.rs` the directory, of a root the crate.
fn module_name(file: &str) -> &str {
    let path = file.trim_end_matches(".rs");
    let path = path.strip_suffix("/mod").unwrap_or(path);
    let path = path.strip_suffix("/src/lib").or(path.strip_suffix("/src/main")).unwrap_or(path);
    path.rsplit('/').next().unwrap_or(path)
}

fn is_split_impl(import: &Import, (file, of): &(&str, &str)) -> bool {
    module_name(&import.from) == *file && import.path.rsplit("::").next() == Some(of)
}

#[test]
fn files_of_a_crate_do_not_import_each_other_in_circles() {
    let mut needed: BTreeSet<&(&str, &str)> = BTreeSet::new();
    let mut faults = Vec::new();
    for (_, mut imports) in imports_by_crate(&sources()) {
        imports.retain(|import| {
            let split = SPLIT_IMPLS.iter().find(|split| is_split_impl(import, split));
            needed.extend(split);
            split.is_none()
        });
        for (files, inside) in cycles(&imports) {
            let names: Vec<&str> = files.iter().map(|file| module_name(file)).collect();
            faults.push(format!("\"{}\"", names.join(" ")));
            faults.extend(inside.iter().map(|i| format!("    {} -> {} by {}", i.from, i.to, i.path)));
        }
    }
    let idle = SPLIT_IMPLS.iter().filter(|split| !needed.contains(split));
    faults.extend(idle.map(|split| format!("{split:?} is not needed in SPLIT_IMPLS any more")));
    no_faults(faults, "files of a crate form a tree");
}
