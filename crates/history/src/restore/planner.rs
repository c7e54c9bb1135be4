//! Plans a restore: the operations that turn the current workspace into the contents of a checkpoint.
//!
//! A plan never names a path that the rules ignore, and replaces or removes an entry only if the safety
//! checkpoint holds the same content. Every other entry becomes a conflict and is left unchanged. Planning
//! changes nothing.

use std::collections::{BTreeMap, BTreeSet};
use std::os::unix::ffi::OsStrExt;
use std::path::Path;
use std::sync::atomic::AtomicBool;

use fermata_protocol::paths::escape;

use nix::dir::Dir;
use nix::errno::Errno;

use crate::History;
use crate::diff::{Diff, compare};
use crate::errors::{HistoryError, Result};
use crate::progress::OnProgress;
use crate::restore::attributes::is_closed;
use crate::restore::hard_links::{self, Fate, Links};
use crate::restore::plan::{
    Conflict, ConflictReason, ContentKind, Operation, Planned, RestoreOptions, RestorePlan, StoredContent,
};
use crate::restore::repository_heads;
use crate::rules::checkpoint_rules::CheckpointRules;
use crate::rules::coverage::IgnoreChain;
use crate::rules::user_repository::{Location, UserRepository};
use crate::store::objects::ObjectStore;
use crate::store::oid::{ObjectKind, Oid};
use crate::tree::confined_dir::{FileKind, Root};
use crate::tree::listing::{CheckpointRoot, ItemContent, Listing, ListingItem, PathCoverage};
use crate::tree::manifest::CheckpointManifest;
use crate::tree::names::{PLAN_ID_DIGITS, RelPath, is_git, is_staged_name};
use crate::workspace::check_workspace;

impl History {
    /// Plans a restore without changing the workspace.
    ///
    /// # Errors
    /// Fails when a checkpoint does not exist or is damaged, or when the workspace cannot be read.
    pub fn plan_restore(
        &self,
        request: &RestoreOptions<'_>,
        progress: OnProgress<'_>,
        cancel: &AtomicBool,
    ) -> Result<Planned> {
        let real = check_workspace(request.workspace)?;
        let root = Root::open(&real)?;
        let wanted = CheckpointRoot::read(&self.objects, &self.refs.get(request.number)?)?;
        let manifest = wanted.manifest(&self.objects)?;
        let (target, now, staged_files) = self.listings_for(request, &root, &wanted, progress, cancel)?;
        let is_selected = |path: &RelPath| is_selected(request.paths, path);
        let names_of = |path: &RelPath| root.stat(path).ok().map(|stat| stat.nlink);
        let location = Location::find(&real);
        let above = IgnoreChain::above(&real, location.as_ref(), &mut Vec::new());
        let mut planner = Planner {
            root: &root,
            target: &target,
            now: &now,
            paths: request.paths,
            links: Links::decide(&target, &now, is_selected, names_of),
            steps: Steps::default(),
            made: BTreeSet::new(),
            cleared: BTreeSet::new(),
            checkpoint_rules: CheckpointRules::of(&self.objects, &root, &wanted, &manifest, above)?,
            blocked: BTreeMap::new(),
            special: 0,
            unlinked: 0,
        };
        planner.write_all()?;
        planner.remove_rest()?;
        planner.set_directories();
        planner.report_uncovered(&self.objects, &wanted)?;
        let repository = location.map(|location| location.describe());
        let warnings = planner.warnings(&manifest, repository.as_ref());
        let conflicts = planner.blocked.iter();
        let conflicts = conflicts.map(|(path, reason)| Conflict { path: path.clone(), reason: *reason }).collect();
        let operations = planner.steps.in_order();
        let text = format!("{} {:?} {} {operations:?}", request.number, request.safety, real.display());
        let closed = closed_dirs(&root, &operations, &staged_files);
        let plan = RestorePlan {
            id: Oid::of(ObjectKind::Blob, text.as_bytes()).to_string()[..PLAN_ID_DIGITS].to_owned(),
            number: request.number,
            safety: request.safety,
            paths: request.paths.map(<[RelPath]>::to_vec),
            workspace: escape(real.as_os_str().as_bytes()),
            operations,
            staged_files,
            closed,
            conflicts,
            warnings,
        };
        let diff = planned_diff(&plan, &now, &target);
        Ok(Planned { plan, diff })
    }

    /// Lists the checkpoint and the current workspace, and finds the temporary files of restores that were given up.
    fn listings_for(
        &self,
        request: &RestoreOptions<'_>,
        root: &Root,
        wanted: &CheckpointRoot,
        progress: OnProgress<'_>,
        cancel: &AtomicBool,
    ) -> Result<(Listing, Listing, Vec<RelPath>)> {
        let Some(safety) = request.safety else {
            let target = self.listing_of(request.number)?;
            let now = self.workspace_listing(root, request.rules, progress, cancel)?;
            return Ok((target, now, Vec::new()));
        };
        let current = CheckpointRoot::read(&self.objects, &self.refs.get(safety)?)?;
        let (target, now) = Listing::of_both(&self.objects, wanted, &current, request.paths)?;
        let staged_files = staged_files_in(root, &now);
        if hard_links::differ(&target, &now) {
            // Other names of a file may be in directories that are equal in both.
            return Ok((self.listing_of(request.number)?, self.listing_of(safety)?, staged_files));
        }
        Ok((target, now, staged_files))
    }

    /// Refuses paths that neither the checkpoint nor the workspace has, and paths that are never restored.
    ///
    /// # Errors
    /// Fails when the checkpoint does not exist or is damaged, and when a path is refused.
    pub fn check_paths(&self, number: u64, workspace: &Path, paths: &[RelPath]) -> Result<()> {
        let wanted = CheckpointRoot::read(&self.objects, &self.refs.get(number)?)?;
        let root = Root::open(&check_workspace(workspace)?)?;
        for path in paths {
            if !path.is_restorable() {
                return Err(HistoryError::UnsafePath { path: path.to_string() });
            }
            let exists = || root.stat_if_there(path).is_ok_and(|stat| stat.is_some());
            if wanted.top().coverage_of(&self.objects, path)?.is_none() && !exists() {
                return Err(HistoryError::NoSuchPath { path: path.to_string(), number });
            }
        }
        Ok(())
    }
}

/// Compares the workspace before the restore with the one after it.
fn planned_diff(plan: &RestorePlan, now: &Listing, target: &Listing) -> Diff {
    let mut diff = compare(now, target);
    // A path that the plan leaves unchanged because of a conflict is not a change.
    let stays = |path: &RelPath| {
        let unchanged = |conflict: &Conflict| {
            matches!(conflict.reason, ConflictReason::IgnoredThen | ConflictReason::WasSpecial)
                && path.is_within(&conflict.path)
        };
        plan.conflicts.iter().any(unchanged)
    };
    diff.entries.retain(|entry| is_selected(plan.paths.as_deref(), &entry.path) && !stays(&entry.path));
    diff
}

fn is_selected(paths: Option<&[RelPath]>, path: &RelPath) -> bool {
    paths.is_none_or(|paths| paths.iter().any(|chosen| path.is_within(chosen)))
}

/// Finds the temporary files of restores that were given up. Only directories that differ are searched, since
/// such a file changes its directory.
fn staged_files_in(root: &Root, now: &Listing) -> Vec<RelPath> {
    let mut paths = Vec::new();
    for (path, _) in now.items.iter().filter(|(_, item)| item.content == ItemContent::Directory) {
        let Ok(mut dir) = root.open_dir(path).and_then(Dir::from_fd) else {
            continue;
        };
        let names = dir.iter().filter_map(std::result::Result::ok);
        let names = names.filter(|entry| is_staged_name(entry.file_name().to_bytes()));
        paths.extend(names.map(|entry| path.join(entry.file_name().to_bytes())));
    }
    paths
}

/// Finds the directories that a restore without privileges must open and for which the plan sets no mode.
fn closed_dirs(root: &Root, operations: &[Operation], staged_files: &[RelPath]) -> Vec<(RelPath, u32)> {
    let sets_mode = |step: &&Operation| matches!(step, Operation::SetAttributes { .. });
    let set: BTreeSet<&RelPath> = operations.iter().filter(sets_mode).map(Operation::path).collect();
    let changed = operations.iter().filter(|step| !sets_mode(step)).map(Operation::path).chain(staged_files);
    let dirs: BTreeSet<RelPath> = changed.filter_map(RelPath::parent).filter(|dir| !set.contains(dir)).collect();
    let closed = |dir: RelPath| {
        let stat = root.stat(&dir).ok().filter(|stat| stat.kind() == FileKind::Directory && is_closed(stat))?;
        Some((dir, stat.permissions()))
    };
    dirs.into_iter().filter_map(closed).collect()
}

#[derive(Default)]
struct Steps {
    /// Removals of entries of another kind than the checkpoint has at their path, the deepest last.
    clear: BTreeMap<RelPath, Operation>,
    write: Vec<Operation>,
    /// Hard links, which follow the files that they link to.
    link: Vec<Operation>,
    remove: BTreeMap<RelPath, Operation>,
    attributes: BTreeMap<RelPath, Operation>,
}

impl Steps {
    fn in_order(self) -> Vec<Operation> {
        let clear = self.clear.into_values().rev();
        let remove = self.remove.into_values().rev();
        // Creating or removing an entry changes the time of its directory, so attributes are set last, children
        // first.
        let attributes = self.attributes.into_values().rev();
        clear.chain(self.write).chain(self.link).chain(remove).chain(attributes).collect()
    }
}

struct Planner<'a> {
    root: &'a Root,
    target: &'a Listing,
    /// The workspace as the safety checkpoint holds it.
    now: &'a Listing,
    paths: Option<&'a [RelPath]>,
    links: Links,
    steps: Steps,
    /// Directories that the plan creates.
    made: BTreeSet<RelPath>,
    /// Paths that the plan frees for another entry, each with everything below it.
    cleared: BTreeSet<RelPath>,
    /// The rules of the checkpoint.
    checkpoint_rules: CheckpointRules<'a>,
    blocked: BTreeMap<RelPath, ConflictReason>,
    special: u64,
    unlinked: u64,
}

impl Planner<'_> {
    fn is_selected(&self, path: &RelPath) -> bool {
        is_selected(self.paths, path)
    }

    fn is_below(set: &BTreeSet<RelPath>, path: &RelPath) -> bool {
        let mut at = Some(path.clone());
        while let Some(path) = at {
            if set.contains(&path) {
                return true;
            }
            at = path.parent();
        }
        false
    }

    fn is_blocked(&self, path: &RelPath) -> bool {
        let mut at = Some(path.clone());
        while let Some(path) = at {
            if self.blocked.contains_key(&path) {
                return true;
            }
            at = path.parent();
        }
        false
    }

    fn warnings(&self, manifest: &CheckpointManifest, repository: Option<&UserRepository>) -> Vec<String> {
        let mut warnings: Vec<String> = Vec::new();
        warnings.extend(repository_heads::moved(manifest.user_repository.as_ref(), repository));
        let torn = manifest.torn.iter().filter(|path| self.is_selected(path)).count();
        if torn > 0 {
            warnings.push(format!("{torn} files changed while the checkpoint was taken"));
        }
        if self.special > 0 {
            warnings.push(format!("{} special files are not created again", self.special));
        }
        if self.unlinked > 0 {
            warnings.push(format!(
                "{} files had other names that the checkpoint does not cover; they become separate files",
                self.unlinked
            ));
        }
        warnings
    }

    fn write_all(&mut self) -> Result<()> {
        let target = self.target;
        for (path, item) in &target.items {
            if !path.is_restorable() {
                return Err(HistoryError::UnsafePath { path: path.to_string() });
            }
            if path.is_root() || !self.is_selected(path) || self.is_blocked(path) {
                continue;
            }
            if let Err(reason) = self.write_one(path, item)? {
                self.blocked.insert(path.clone(), reason);
            }
        }
        Ok(())
    }

    fn write_one(&mut self, path: &RelPath, item: &ListingItem) -> Result<std::result::Result<(), ConflictReason>> {
        let now = self.now;
        let current = now.items.get(path).filter(|_| !Self::is_below(&self.cleared, path));
        let Some(current) = current else {
            return self.write_new(path, item);
        };
        match (&item.content, &current.content) {
            (ItemContent::Special(kind), ItemContent::Special(now)) if kind == now => Ok(Ok(())),
            (ItemContent::Special(_), _) => Ok(Err(ConflictReason::WasSpecial)),
            (_, ItemContent::Special(_)) => Ok(Err(ConflictReason::Special)),
            (ItemContent::Directory, ItemContent::Directory) => Ok(Ok(())),
            (ItemContent::Directory, ItemContent::File(_) | ItemContent::Symlink(_)) => {
                if let Some(holds) = stored_content(current) {
                    self.steps.clear.insert(path.clone(), Operation::RemoveFile { path: path.clone(), holds });
                }
                self.cleared.insert(path.clone());
                self.write_new(path, item)
            }
            (ItemContent::File(_) | ItemContent::Symlink(_), ItemContent::Directory) => {
                if let Err(reason) = self.clear_directory(path) {
                    return Ok(Err(reason));
                }
                self.write_new(path, item)
            }
            (ItemContent::File(_) | ItemContent::Symlink(_), ItemContent::File(_) | ItemContent::Symlink(_)) => {
                let separate = matches!(self.links.fate(path), Some(Fate::Alone | Fate::LinkedTo(_)));
                let holes = current.sparse || !item.sparse;
                if item.same_content(current) && !separate && holes {
                    self.set_file(path, item, current);
                } else {
                    self.push_write(path, item, stored_content(current));
                }
                Ok(Ok(()))
            }
        }
    }

    /// Sets the attributes that differ of a file or link whose content is right.
    fn set_file(&mut self, path: &RelPath, item: &ListingItem, current: &ListingItem) {
        let link = matches!(item.content, ItemContent::Symlink(_));
        let same = if link { item.mtime == current.mtime } else { item.same_attributes(current) };
        if same {
            return;
        }
        let names = match self.links.fate(path) {
            Some(Fate::Kept { names }) => *names,
            Some(Fate::Alone | Fate::LinkedTo(_)) | None => 1,
        };
        let xattrs = (item.xattrs != current.xattrs).then(|| item.xattrs.clone());
        let (path, mode, mtime) = (path.clone(), (!link).then_some(item.mode), item.mtime);
        self.steps.write.push(Operation::SetAttributes { path, mode, mtime, xattrs, names });
    }

    /// Plans to write an entry where no covered entry exists.
    fn write_new(&mut self, path: &RelPath, item: &ListingItem) -> Result<std::result::Result<(), ConflictReason>> {
        if !Self::is_below(&self.cleared, path) {
            match self.root.stat_if_there(path) {
                Ok(Some(stat)) if stat.kind() == FileKind::Directory && item.content == ItemContent::Directory => {
                    // An ignored directory stays as it is; the entries that the checkpoint has in it are
                    // handled separately.
                    return Ok(Ok(()));
                }
                Ok(Some(stat)) if matches!(item.content, ItemContent::Special(_)) => {
                    let special = matches!(stat.kind(), FileKind::Special(_));
                    return Ok(if special { Ok(()) } else { Err(ConflictReason::WasSpecial) });
                }
                Ok(Some(_)) => return Ok(Err(ConflictReason::NotCovered)),
                Ok(None) => {}
                // A symbolic link that is not covered is above the path.
                Err(Errno::ELOOP) => return Ok(Err(ConflictReason::BlockedAbove)),
                // A directory that cannot be entered was not covered either.
                Err(Errno::EACCES) => return Ok(Err(ConflictReason::NotCovered)),
                Err(errno) => {
                    return Err(HistoryError::io("read the metadata of", &self.root.show(path))(errno));
                }
            }
        }
        if matches!(item.content, ItemContent::Special(_)) {
            self.special += 1;
            return Ok(Ok(()));
        }
        if !self.make_parents(path)? {
            return Ok(Err(ConflictReason::BlockedAbove));
        }
        if item.content == ItemContent::Directory {
            self.make_directory(path);
        } else {
            self.push_write(path, item, None);
        }
        Ok(Ok(()))
    }

    fn make_directory(&mut self, path: &RelPath) {
        if self.made.insert(path.clone()) {
            self.steps.write.push(Operation::MakeDirectory { path: path.clone() });
        }
    }

    /// Plans the directories above a path, which may be missing if only some paths are restored. Returns
    /// `false` if another entry is in the way.
    fn make_parents(&mut self, path: &RelPath) -> Result<bool> {
        let mut above = Vec::new();
        let mut at = path.parent();
        while let Some(dir) = at {
            at = dir.parent();
            above.push(dir);
        }
        for dir in above.into_iter().rev().filter(|dir| !dir.is_root()) {
            if self.made.contains(&dir) {
                continue;
            }
            if self.now.items.get(&dir).is_some_and(|item| item.content == ItemContent::Directory)
                && !Self::is_below(&self.cleared, &dir)
            {
                continue;
            }
            match self.root.stat_if_there(&dir) {
                Ok(Some(stat)) if stat.kind() == FileKind::Directory => {}
                Ok(None) => self.make_directory(&dir),
                Ok(Some(_)) | Err(Errno::ELOOP | Errno::EACCES) => return Ok(false),
                Err(errno) => {
                    return Err(HistoryError::io("read the metadata of", &self.root.show(&dir))(errno));
                }
            }
        }
        Ok(true)
    }

    fn push_write(&mut self, path: &RelPath, item: &ListingItem, replaces: Option<StoredContent>) {
        let (mode, mtime) = (item.mode, item.mtime);
        match item.content {
            ItemContent::File(oid) => {
                let linked_to = match self.links.fate(path) {
                    Some(Fate::LinkedTo(leader)) => Some(leader.clone()),
                    Some(Fate::Alone | Fate::Kept { .. }) | None => None,
                };
                self.unlinked += u64::from(self.links.is_lone(path));
                let steps = if linked_to.is_some() { &mut self.steps.link } else { &mut self.steps.write };
                let (path, xattrs, sparse) = (path.clone(), item.xattrs.clone(), item.sparse);
                steps.push(Operation::WriteFile { path, oid, mode, mtime, replaces, xattrs, sparse, linked_to });
            }
            ItemContent::Symlink(oid) => {
                self.steps.write.push(Operation::WriteLink { path: path.clone(), oid, mtime, replaces });
            }
            ItemContent::Directory | ItemContent::Special(_) => {}
        }
    }

    /// Frees the path of a directory for a file if the safety checkpoint holds everything in the directory.
    fn clear_directory(&mut self, path: &RelPath) -> std::result::Result<(), ConflictReason> {
        let mut steps = vec![Operation::RemoveDirectory { path: path.clone() }];
        let mut dirs = vec![path.clone()];
        while let Some(dir) = dirs.pop() {
            let opened = self.root.open_dir(&dir).and_then(Dir::from_fd);
            let mut handle = opened.map_err(|_| ConflictReason::HoldsUncovered)?;
            for entry in handle.iter() {
                let entry = entry.map_err(|_| ConflictReason::HoldsUncovered)?;
                let name = entry.file_name().to_bytes();
                if name == b"." || name == b".." {
                    continue;
                }
                // The plan removes it before anything else.
                if is_staged_name(name) {
                    continue;
                }
                let below = dir.join(name);
                if is_git(name) || self.target.is_unknown(&below) {
                    return Err(ConflictReason::HoldsUncovered);
                }
                let is_dir = self.now.items.get(&below).is_some_and(|item| item.content == ItemContent::Directory);
                if !self.checkpoint_rules.covers(&below, is_dir).unwrap_or(false) {
                    return Err(ConflictReason::HoldsUncovered);
                }
                let item = self.now.items.get(&below).ok_or(ConflictReason::HoldsUncovered)?;
                match item.content {
                    ItemContent::Directory => {
                        steps.push(Operation::RemoveDirectory { path: below.clone() });
                        dirs.push(below);
                    }
                    ItemContent::Special(_) => return Err(ConflictReason::Special),
                    ItemContent::File(_) | ItemContent::Symlink(_) => {
                        let holds = stored_content(item).ok_or(ConflictReason::Special)?;
                        steps.push(Operation::RemoveFile { path: below, holds });
                    }
                }
            }
        }
        self.steps.clear.extend(steps.into_iter().map(|step| (step.path().clone(), step)));
        self.cleared.insert(path.clone());
        Ok(())
    }

    /// Removes the entries that the checkpoint does not have.
    fn remove_rest(&mut self) -> Result<()> {
        let now = self.now;
        for (path, item) in &now.items {
            let wanted = self.target.items.contains_key(path) || self.target.is_unknown(path);
            if path.is_root() || wanted || !self.is_selected(path) {
                continue;
            }
            if self.steps.clear.contains_key(path) || self.is_blocked(path) {
                continue;
            }
            if !self.checkpoint_rules.covers(path, item.content == ItemContent::Directory)? {
                self.blocked.insert(path.clone(), ConflictReason::IgnoredThen);
                continue;
            }
            match &item.content {
                ItemContent::Directory => {
                    let step = Operation::RemoveDirectory { path: path.clone() };
                    self.steps.remove.insert(path.clone(), step);
                }
                // A special file cannot be restored later and has no content: it stays.
                ItemContent::Special(_) => {}
                ItemContent::File(_) | ItemContent::Symlink(_) => {
                    if let Some(holds) = stored_content(item) {
                        let step = Operation::RemoveFile { path: path.clone(), holds };
                        self.steps.remove.insert(path.clone(), step);
                    }
                }
            }
        }
        Ok(())
    }

    /// Sets the attributes of directories that differ or that the plan changes.
    fn set_directories(&mut self) {
        let steps = &self.steps;
        let all = steps.clear.values().chain(&steps.write).chain(&steps.link).chain(steps.remove.values());
        let touched: BTreeSet<RelPath> = all.filter_map(|step| step.path().parent()).collect();
        for (path, item) in &self.target.items {
            if item.content != ItemContent::Directory || self.is_blocked(path) {
                continue;
            }
            let current = self.now.items.get(path).filter(|current| current.content == ItemContent::Directory);
            let made = self.made.contains(path);
            let selected = self.is_selected(path);
            let differs = current.is_none_or(|now| !now.same_attributes(item));
            // A path outside the request keeps its attributes, and the restore does not change an ignored
            // directory.
            if made || (selected && current.is_some() && (differs || touched.contains(path))) {
                let xattrs = current.map_or(&[][..], |now| &now.xattrs);
                let xattrs = (*item.xattrs != *xattrs).then(|| item.xattrs.clone());
                let (mode, mtime) = (Some(item.mode), item.mtime);
                let step = Operation::SetAttributes { path: path.clone(), mode, mtime, xattrs, names: u64::MAX };
                self.steps.attributes.insert(path.clone(), step);
            }
        }
    }

    /// Reports requested paths that neither the checkpoint nor the current rules cover.
    fn report_uncovered(&mut self, store: &ObjectStore, wanted: &CheckpointRoot) -> Result<()> {
        for path in self.paths.unwrap_or_default() {
            let listed = |listing: &Listing| listing.items.keys().any(|one| one.is_within(path));
            let covered = match wanted.top().coverage_of(store, path)? {
                Some(PathCoverage::Stored) => true,
                Some(PathCoverage::Skipped) => false,
                None => listed(self.now),
            };
            let exists = || self.root.stat_if_there(path).is_ok_and(|stat| stat.is_some());
            if !covered && exists() {
                self.blocked.insert(path.clone(), ConflictReason::NotCovered);
            }
        }
        Ok(())
    }
}

/// Returns the content that the restore may replace, since the safety checkpoint holds it.
fn stored_content(item: &ListingItem) -> Option<StoredContent> {
    match item.content {
        ItemContent::File(oid) => Some(StoredContent { kind: ContentKind::File, oid }),
        ItemContent::Symlink(oid) => Some(StoredContent { kind: ContentKind::Symlink, oid }),
        ItemContent::Directory | ItemContent::Special(_) => None,
    }
}
