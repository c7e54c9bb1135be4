//! Full verification: compares the whole workspace with the whole checkpoint, in the background after a
//! restore.
//!
//! The restore itself has already compared every path that it changed. Full verification finds differences at
//! all other paths. It does not report changes that were made after the restore, and changes nothing.

use std::collections::BTreeSet;
use std::sync::atomic::AtomicBool;

use crate::History;
use crate::errors::Result;
use crate::progress::OnProgress;
use crate::restore::plan::RestorePlan;
use crate::restore::recheck::Times;
use crate::restore::report::{Mismatch, RestoreReport};
use crate::rules::coverage::Rules;
use crate::tree::confined_dir::{Root, Time};
use crate::tree::fingerprint::TICK_NS;
use crate::tree::listing::{ItemContent, ListingItem};
use crate::tree::names::RelPath;
use crate::workspace::check_workspace;

/// The result of a full verification.
#[derive(Clone, Debug, Default, PartialEq, Eq)]
pub struct FullVerification {
    /// The number of compared paths.
    pub paths: u64,
    /// The paths that differ from the checkpoint, in byte order.
    pub mismatches: Vec<Mismatch>,
}

impl History {
    /// Compares the workspace with the checkpoint of a plan that was carried out. Paths that changed after
    /// `ended` are ignored.
    ///
    /// # Errors
    /// Fails when the checkpoint is damaged, when the workspace cannot be read, and when cancelled.
    pub fn check_restored(
        &self,
        plan: &RestorePlan,
        report: &RestoreReport,
        rules: &Rules,
        ended: Time,
        progress: OnProgress<'_>,
        cancel: &AtomicBool,
    ) -> Result<FullVerification> {
        let real = check_workspace(&crate::restore::plan::workspace_of(plan)?)?;
        let root = Root::open(&real)?;
        let target = self.listing_of(plan.number)?;
        let now = self.workspace_listing(&root, rules, progress, cancel)?;
        let is_exempt = |path: &RelPath| {
            let chosen = plan.paths.as_ref().is_none_or(|paths| paths.iter().any(|one| path.is_within(one)));
            let reported = plan.conflicts.iter().any(|conflict| path.is_within(&conflict.path))
                || report.mismatches.iter().any(|one| path.is_within(&one.path))
                || report.kept.contains(path);
            !chosen || reported || target.is_unknown(path) || now.is_unknown(path)
        };
        let mut check = FullVerification::default();
        let mut times = Times::default();
        let paths: BTreeSet<&RelPath> = target.items.keys().chain(now.items.keys()).collect();
        for path in paths {
            if is_exempt(path) {
                continue;
            }
            check.paths += 1;
            let (wanted, actual) = (target.items.get(path), now.items.get(path));
            let problem = match (wanted, actual) {
                (Some(wanted), Some(actual)) => {
                    let problem = difference(wanted, actual, report.without_xattrs.contains(path));
                    let is_unchanged = || wanted.mtime == actual.mtime || is_older(&root, path, ended);
                    if problem.is_none() && is_unchanged() {
                        times.compare(path, wanted.mtime, actual.mtime);
                    }
                    problem
                }
                (Some(wanted), None) if is_special(wanted) => None,
                (Some(_), None) => Some("it is missing".to_owned()),
                (None, Some(actual)) if is_special(actual) => None,
                (None, Some(_)) => Some("the checkpoint does not have it".to_owned()),
                (None, None) => None,
            };
            if let Some(problem) = problem.filter(|_| is_older(&root, path, ended)) {
                check.mismatches.push(Mismatch { path: path.clone(), problem });
            }
        }
        // The report of the restore has already mentioned coarse times.
        check.mismatches.extend(times.conclude().0);
        check.mismatches.sort_by(|a, b| a.path.cmp(&b.path));
        Ok(check)
    }
}

fn is_special(item: &ListingItem) -> bool {
    matches!(item.content, ItemContent::Special(_))
}

fn difference(wanted: &ListingItem, actual: &ListingItem, without_xattrs: bool) -> Option<String> {
    if is_special(wanted) || is_special(actual) {
        return None;
    }
    if !wanted.same_content(actual) {
        return Some("its content differs".to_owned());
    }
    let link = matches!(wanted.content, ItemContent::Symlink(_));
    if !link && wanted.mode != actual.mode {
        return Some(format!("its mode is {:o}", actual.mode));
    }
    let differ = !link && !without_xattrs && wanted.xattrs != actual.xattrs;
    differ.then(|| "its extended attributes differ".to_owned())
}

/// Says whether a path, or the directory that it is missing from, has not changed since the restore.
fn is_older(root: &Root, path: &RelPath, ended: Time) -> bool {
    let mut at = Some(path.clone());
    while let Some(path) = at {
        match root.stat_if_there(&path) {
            // The clock of the file system may lag behind the clock from which `ended` was read.
            Ok(Some(stat)) => return stat.ctime.nanos() < ended.nanos() - TICK_NS,
            Ok(None) => at = path.parent(),
            Err(_) => return false,
        }
    }
    false
}
