//! Decides how to restore files that have several names, or had several at the checkpoint.
//!
//! A file is changed in place only if all of its names are to change in the same way; otherwise a name gets a
//! new file. So a write through one name never reaches another one that the checkpoint does not link to it.
//! This module works on listings, which must be complete if links differ.

use std::collections::{BTreeMap, BTreeSet};

use crate::store::oid::Oid;
use crate::tree::confined_dir::Time;
use crate::tree::listing::{ItemContent, Listing, ListingItem};
use crate::tree::names::RelPath;
use crate::tree::xattrs::Xattrs;

/// The decision for one name of a file.
#[derive(Clone, Debug, PartialEq, Eq)]
pub(crate) enum Fate {
    /// The name gets a new file, even if the content is right.
    Alone,
    /// The name becomes another name of this file.
    LinkedTo(RelPath),
    /// The name stays linked as it is.
    Kept {
        /// The largest number of names that the file has in the end.
        names: u64,
    },
}

/// The decisions for all names that hard links concern.
#[derive(Debug, Default)]
pub(crate) struct Links {
    fates: BTreeMap<RelPath, Fate>,
    /// Names of files that had names outside of the checkpoint.
    lone: BTreeSet<RelPath>,
}

/// Properties that all names of one file share. The inode number alone is not enough, since a workspace may
/// span file systems.
type LinkIdentity<'a> = (u64, Oid, u32, Time, &'a Xattrs);

fn identity(item: &ListingItem) -> Option<LinkIdentity<'_>> {
    match item.content {
        ItemContent::File(oid) => Some((item.ino?, oid, item.mode, item.mtime, &item.xattrs)),
        ItemContent::Symlink(_) | ItemContent::Directory | ItemContent::Special(_) => None,
    }
}

type Groups<'a> = BTreeMap<LinkIdentity<'a>, BTreeSet<&'a RelPath>>;

fn groups(listing: &Listing) -> Groups<'_> {
    let mut groups = Groups::new();
    for (path, item) in &listing.items {
        if let Some(identity) = identity(item) {
            groups.entry(identity).or_default().insert(path);
        }
    }
    groups
}

/// Says whether files with several names differ, so that complete listings are needed to decide.
pub(crate) fn differ(target: &Listing, now: &Listing) -> bool {
    let differs = |one: &Listing, other: &Listing| {
        one.items.iter().any(|(path, item)| item.ino.is_some() && other.items.get(path) != Some(item))
    };
    differs(target, now) || differs(now, target)
}

impl Links {
    /// Decides for all selected names. `names_of` returns the current number of names of the file at a path.
    pub fn decide(
        target: &Listing,
        now: &Listing,
        is_selected: impl Fn(&RelPath) -> bool,
        names_of: impl Fn(&RelPath) -> Option<u64>,
    ) -> Links {
        let (wanted, current_groups) = (groups(target), groups(now));
        let mut links = Links::default();
        let mut claimed = BTreeSet::new();
        for (path, item) in target.items.iter().filter(|(path, _)| is_selected(path)) {
            let group = identity(item).and_then(|identity| wanted.get(&identity));
            if group.is_some_and(|group| group.len() > 1) || !matches!(item.content, ItemContent::File(_)) {
                continue;
            }
            if item.ino.is_some() {
                links.lone.insert(path.clone());
            }
            let current = now.items.get(path).and_then(|item| Some((item, current_groups.get(&identity(item)?)?)));
            if let Some((current, names)) = current
                && (names.len() > 1 || item.ino.is_none() || !item.same_attributes(current))
            {
                links.fates.insert(path.clone(), Fate::Alone);
            }
        }
        for group in wanted.values().filter(|group| group.len() > 1) {
            let selected: Vec<&RelPath> = group.iter().copied().filter(|path| is_selected(path)).collect();
            let kept = best_kept(group, target, now, &current_groups, &claimed, (&is_selected, &names_of));
            claimed.extend(kept.iter().copied());
            let leader = group.iter().find(|path| kept.contains(*path)).or(selected.first()).copied();
            for path in selected {
                let fate = match leader {
                    _ if kept.contains(path) => Fate::Kept { names: group.len() as u64 },
                    Some(leader) if leader != path => Fate::LinkedTo(leader.clone()),
                    _ => Fate::Alone,
                };
                links.fates.insert(path.clone(), fate);
            }
        }
        links
    }

    /// Returns the decision for a name; `None` if hard links do not concern it.
    pub fn fate(&self, path: &RelPath) -> Option<&Fate> {
        self.fates.get(path)
    }

    /// Says whether the file had names that the checkpoint does not cover.
    pub fn is_lone(&self, path: &RelPath) -> bool {
        self.lone.contains(path)
    }
}

/// Finds the file with the most names in a group that can stay unchanged, and returns all of its covered names.
fn best_kept<'a>(
    group: &BTreeSet<&RelPath>,
    target: &Listing,
    now: &'a Listing,
    current_groups: &Groups<'a>,
    claimed: &BTreeSet<&RelPath>,
    (is_selected, names_of): (&impl Fn(&RelPath) -> bool, &impl Fn(&RelPath) -> Option<u64>),
) -> BTreeSet<&'a RelPath> {
    let mut best = BTreeSet::new();
    let mut best_count = 0;
    for member in group {
        let (Some(wanted), Some((path, current))) = (target.items.get(*member), now.items.get_key_value(*member))
        else {
            continue;
        };
        if best.contains(path) || claimed.contains(path) || !wanted.same_content(current) {
            continue;
        }
        let names = identity(current).and_then(|identity| current_groups.get(&identity)).cloned();
        let names = names.unwrap_or_else(|| BTreeSet::from([path]));
        // Names outside the group must be selected, since they get a new file or are removed.
        let freed = names.iter().all(|name| group.contains(name) || is_selected(name));
        let all_selected = names.iter().all(|name| group.contains(name) && is_selected(name));
        let settable = || all_selected && names_of(path) == Some(names.len() as u64);
        let holes = current.sparse || !wanted.sparse;
        let count = names.iter().filter(|name| group.contains(*name)).count();
        if count > best_count && freed && holes && (wanted.same_attributes(current) || settable()) {
            (best, best_count) = (names, count);
        }
    }
    best
}
