//! The part of a walk within one directory: visits its names, then its subdirectories.

use std::ffi::OsStr;
use std::os::unix::ffi::OsStrExt;
use std::sync::atomic::Ordering;
use std::sync::{Arc, PoisonError};

use nix::errno::Errno;
use rayon::prelude::*;

use crate::errors::{HistoryError, Result};
use crate::rules::decision::MatchDecision;
use crate::rules::rule_cache::CompiledRules;
use crate::scan::pool;
use crate::scan::scan_result::{NewDir, ScanEntry, ScanResult, ScannedNode};
use crate::scan::walk::{LastDir, OpenedDir, VisitedNames, WalkedDir, WorkspaceWalk};
use crate::scan::watcher::Dirty;
use crate::scan::workspace_state::{Child, DirProperties, Node};
use crate::tree::confined_dir::{FileKind, FileStat, is_resource_shortage, stat_at};
use crate::tree::names::{RelPath, is_git, is_staged_name};
use crate::tree::skipped::SkipReason;

/// `PATH_MAX`: the kernel opens no longer paths.
const MAX_PATH: usize = 4096;

/// A subdirectory that is still to be walked.
struct Subdir {
    name: Box<[u8]>,
    path: RelPath,
    /// The rules outside of it.
    rules: CompiledRules,
    covered: bool,
}

/// The walk of one directory.
struct DirWalk<'w> {
    walk: &'w WorkspaceWalk<'w>,
    path: &'w RelPath,
    last: LastDir<'w>,
    names: &'w VisitedNames,
    /// The rules within the directory.
    rules: CompiledRules,
    dirty: Option<&'w Dirty>,
    entries: Vec<ScanEntry>,
    subdirs: Vec<Subdir>,
    /// Whether the directory or an entry differs from the last state.
    changed: bool,
    /// Whether a subdirectory vanished after it was listed.
    vanished: bool,
}

impl WorkspaceWalk<'_> {
    /// Visits the given names of a directory and everything below them.
    pub(super) fn list(
        &self,
        dir: &WalkedDir<'_>,
        opened: OpenedDir,
        last: LastDir<'_>,
        names: &VisitedNames,
        dirty: Option<&Dirty>,
    ) -> Result<ScanResult> {
        let nested = !dir.path.is_root()
            && match names {
                VisitedNames::All(names) => names.contains(&b".git"[..]),
                VisitedNames::Covered(_) | VisitedNames::Reported(_) => {
                    last.dir.is_some_and(|state| state.properties.nested)
                }
            };
        let mut properties = DirProperties {
            fingerprint: opened.fingerprint,
            xattrs: self.dir_xattrs(dir.path, &opened, last),
            covered: dir.covered,
            settled: opened.fingerprint.is_settled(self.started_ns),
            unreadable: None,
            ignore_file: opened.ignore_file,
            ignore_settled: opened.ignore_file.is_none_or(|file| file.is_settled(self.started_ns)),
            nested,
        };
        // Other rules in this directory are other rules below it, too. A tracked file may be ignored now.
        let same_rules = last.dir.is_none_or(|state| {
            let before = &state.properties;
            (before.ignore_file, before.nested) == (properties.ignore_file, nested)
                && (before.ignore_settled || properties.ignore_file.is_none())
        });
        if !same_rules {
            self.findings.rules_changed.store(true, Ordering::Relaxed);
        }
        let ignore_file = properties.ignore_file;
        let rules = self.rule_cache.within(dir.path, &dir.outside, self.root, ignore_file, nested, self.started_ns);
        let mut walk = DirWalk {
            walk: self,
            path: dir.path,
            last: LastDir { decided: last.decided && same_rules, ..last },
            names,
            rules,
            dirty,
            entries: Vec::new(),
            subdirs: Vec::new(),
            changed: last.dir.is_none_or(|state| state.properties != properties),
            vanished: false,
        };
        walk.keep_unreported();
        names.iter().try_for_each(|name| walk.visit(&opened, name))?;
        drop(opened);
        walk.walk_subdirs()?;
        let DirWalk { mut entries, changed, vanished, .. } = walk;
        // Objects of an earlier workspace state may be gone, unless the scan relies on that state.
        if let (false, Some(state), None) = (changed, last.dir, self.check_in) {
            return Ok(ScanResult::Same(Arc::clone(state)));
        }
        entries.sort_by(|a, b| a.name().cmp(b.name()));
        properties.settled &= !vanished;
        Ok(ScanResult::New(Box::new(NewDir { properties, entries })))
    }
}

impl<'w> DirWalk<'w> {
    fn last_child(&self, name: &[u8]) -> Option<&'w Arc<Child>> {
        self.last.dir.and_then(|state| state.child(name))
    }

    /// Takes over the entries that were not reported.
    fn keep_unreported(&mut self) {
        if let (VisitedNames::Reported(names), Some(state)) = (self.names, self.last.dir) {
            let kept = state.children.iter().filter(|child| !names.contains(&child.name));
            self.entries.extend(kept.cloned().map(ScanEntry::Same));
        }
    }

    fn add(&mut self, name: &[u8], node: ScannedNode) {
        self.entries.push(ScanEntry::New(name.into(), node));
    }

    fn skip(&mut self, name: &[u8], reason: SkipReason, detail: &str) {
        self.add(name, ScannedNode::Complete(Node::Skipped { reason, detail: detail.into() }));
    }

    /// Determines the entry at a name; a subdirectory is walked later.
    fn visit(&mut self, opened: &OpenedDir, name: &[u8]) -> Result<()> {
        if matches!(name, b"." | b".." | b".git") {
            return Ok(());
        }
        let path = self.path.join(name);
        if self.walk.store_path.as_ref() == Some(&path) {
            return Ok(());
        }
        let last = self.last_child(name);
        let stat = stat_at(&opened.fd, OsStr::from_bytes(name));
        if is_git(name) {
            self.changed |= stat.is_ok() != last.is_some();
            if stat.is_ok() {
                self.skip(name, SkipReason::Reserved, "the name is reserved for git");
            }
        } else if path.bytes().len() >= MAX_PATH && !matches!(stat, Err(Errno::ENOENT)) {
            self.changed |= !matches!(last.map(|child| &child.node), Some(Node::Skipped { .. }));
            self.skip(name, SkipReason::Unreadable, "its path is longer than the system allows");
        } else if is_staged_name(name) {
            self.changed |= stat.is_ok() != last.is_some();
            if stat.is_ok() {
                self.add(name, ScannedNode::Complete(Node::StagedFile));
            }
        } else {
            match stat {
                Ok(stat) => self.visit_entry(name, path, &stat, last),
                Err(Errno::ENOENT) => self.changed |= last.is_some(),
                Err(errno) if is_resource_shortage(errno) => {
                    let shown = self.walk.root.show(&path);
                    return Err(HistoryError::io("read the metadata of", &shown)(errno));
                }
                Err(errno) => {
                    self.changed = true;
                    self.skip(name, SkipReason::Unreadable, errno.desc());
                }
            }
        }
        Ok(())
    }

    fn visit_entry(&mut self, name: &[u8], path: RelPath, stat: &FileStat, last: Option<&'w Arc<Child>>) {
        let is_dir = stat.kind() == FileKind::Directory;
        let last_node = last.map(|child| &child.node);
        let (rules, covered, forced) = match self.decide(&path, is_dir, last_node) {
            MatchDecision::NotCovered => {
                self.leave_out(stat);
                self.changed |= last.is_some();
                return;
            }
            MatchDecision::Covered(rules) => (rules, true, false),
            MatchDecision::Search if is_dir => {
                self.walk.findings.ignored.fetch_add(1, Ordering::Relaxed);
                (CompiledRules::OnlyIncluded, false, false)
            }
            MatchDecision::Search | MatchDecision::Forced => (CompiledRules::OnlyIncluded, true, true),
        };
        if is_dir {
            self.subdirs.push(Subdir { name: name.into(), path, rules, covered });
            return;
        }
        let written = self.dirty.is_some_and(|dirty| dirty.written.contains(name));
        match last.filter(|child| !written && self.walk.is_unchanged(&path, stat, forced, &child.node)) {
            Some(child) => self.entries.push(ScanEntry::Same(Arc::clone(child))),
            None => {
                self.changed = true;
                let node = self.walk.scanned_node(path, stat, forced, last_node.filter(|_| !written));
                self.add(name, node);
            }
        }
    }

    fn decide(&self, path: &RelPath, is_dir: bool, last: Option<&Node>) -> MatchDecision {
        let matcher = &self.walk.matcher;
        match (self.names, last) {
            // The earlier decision is still valid.
            (VisitedNames::Covered(_), Some(Node::File(file))) if !is_dir && !file.remarks.forced => {
                MatchDecision::Covered(CompiledRules::Everything)
            }
            (VisitedNames::Covered(_), Some(Node::Dir(dir))) if is_dir && !matcher.own.has_includes() => {
                match dir.properties.covered {
                    true => MatchDecision::Covered(self.rules.clone()),
                    false => MatchDecision::Search,
                }
            }
            _ => matcher.decide(path, is_dir, &self.rules),
        }
    }

    fn leave_out(&self, stat: &FileStat) {
        let findings = &self.walk.findings;
        findings.ignored.fetch_add(1, Ordering::Relaxed);
        // It may be another name of a covered file.
        if stat.kind() == FileKind::Regular && stat.nlink > 1 {
            findings.linked_out.lock().unwrap_or_else(PoisonError::into_inner).insert(stat.ino);
        }
    }

    fn walk_subdirs(&mut self) -> Result<()> {
        let subdirs = std::mem::take(&mut self.subdirs);
        let parallel_from = if self.dirty.is_none() { 2 } else { pool::MANY + 1 };
        let entries: Vec<Option<ScanEntry>> = if subdirs.len() >= parallel_from {
            let this = &*self;
            pool::on(self.walk.urgency, || {
                subdirs.par_iter().map(|subdir| this.walk_subdir(subdir)).collect::<Result<_>>()
            })?
        } else {
            subdirs.iter().map(|subdir| self.walk_subdir(subdir)).collect::<Result<_>>()?
        };
        for (subdir, entry) in subdirs.iter().zip(entries) {
            let last = self.last_child(&subdir.name);
            match &entry {
                Some(ScanEntry::Same(_)) if last.is_some() => {}
                Some(ScanEntry::Same(_) | ScanEntry::New(..)) => self.changed = true,
                None => {
                    // The directory existed a moment ago. It may be moved back without an event.
                    self.vanished = true;
                    if let Some(watch) = self.walk.watch {
                        watch.note(&subdir.path);
                    }
                    self.changed |= last.is_some();
                }
            }
            self.entries.extend(entry);
        }
        Ok(())
    }

    /// Walks a subdirectory; `None` if it has vanished.
    fn walk_subdir(&self, subdir: &Subdir) -> Result<Option<ScanEntry>> {
        let dir = WalkedDir { path: &subdir.path, outside: subdir.rules.clone(), covered: subdir.covered };
        let last_child = self.last_child(&subdir.name);
        let last = match last_child.map(|child| &child.node) {
            Some(Node::Dir(dir)) => Some(dir),
            Some(Node::File(_) | Node::Special { .. } | Node::Skipped { .. } | Node::StagedFile) | None => None,
        };
        let result = match (self.dirty, last) {
            (Some(dirty), Some(last)) => {
                let nothing = Dirty::default();
                self.walk.walk_partial(&dir, last, dirty.below.get(&subdir.name).unwrap_or(&nothing))?
            }
            (None, _) | (_, None) => self.walk.walk_full(&dir, LastDir { dir: last, decided: self.last.decided })?,
        };
        Ok(result.map(|result| match (&result, last, last_child) {
            (ScanResult::Same(same), Some(last), Some(child)) if Arc::ptr_eq(same, last) => {
                ScanEntry::Same(Arc::clone(child))
            }
            _ => ScanEntry::New(subdir.name.clone(), ScannedNode::Dir(result)),
        }))
    }
}
