//! Lists the current workspace in the form in which checkpoints are compared.

use std::sync::atomic::AtomicBool;

use crate::History;
use crate::errors::Result;
use crate::progress::OnProgress;
use crate::rules::coverage::Rules;
use crate::scan::content::Reading;
use crate::scan::pool::Urgency;
use crate::scan::seal::seal;
use crate::scan::workspace_scan::{ScanContext, nanos_now};
use crate::scan::workspace_state::{DirState, Node};
use crate::snapshot_request::Mapped;
use crate::tree::confined_dir::Root;
use crate::tree::fingerprint::FileFingerprint;
use crate::tree::listing::{ItemContent, Listing, ListingItem};
use crate::tree::names::RelPath;
use crate::tree::skipped::SkipReason;
use crate::tree::trees::ObjectSink;
use crate::tree::xattrs::Xattrs;

impl History {
    /// Lists the current workspace with the ids of all contents, without storing anything.
    pub(crate) fn workspace_listing(
        &self,
        root: &Root,
        rules: &Rules,
        progress: OnProgress<'_>,
        cancel: &AtomicBool,
    ) -> Result<Listing> {
        let started_ns = nanos_now();
        let mapped = Mapped::default();
        let urgency = Urgency::Background;
        let context =
            ScanContext { root, rules, mapped: &mapped, started_ns, stores: false, urgency, full: false, cancel };
        let scan = self.scan_workspace(&context)?;
        let spool = self.pending();
        let max_file_bytes = rules.max_file_bytes;
        let reading = Reading { root, sink: None, spool: &spool, max_file_bytes, urgency, progress, cancel };
        reading.read_all(&scan.result.unread())?;
        let sink = ObjectSink { store: &self.objects, pack: None };
        let dir = seal(scan.result, started_ns, urgency, true, &sink)?;
        let mut listing = Listing::default();
        add_dir(&mut listing, &RelPath::root(), &dir);
        Ok(listing)
    }
}

/// Adds a directory and everything below it.
fn add_dir(listing: &mut Listing, path: &RelPath, dir: &DirState) {
    if dir.is_bare() {
        return;
    }
    let properties = &dir.properties;
    let item =
        ListingItem { xattrs: properties.xattrs.clone(), ..item_of(&properties.fingerprint, ItemContent::Directory) };
    listing.items.insert(path.clone(), item);
    if properties.unreadable.is_some() {
        listing.skipped.insert(path.clone(), SkipReason::Unreadable);
    }
    for child in &dir.children {
        let path = path.join(&child.name);
        match &child.node {
            Node::Dir(dir) => add_dir(listing, &path, dir),
            Node::File(file) => {
                let content = if file.is_link() { ItemContent::Symlink(file.oid) } else { ItemContent::File(file.oid) };
                listing.torn.extend(file.remarks.torn.then(|| path.clone()));
                let item = ListingItem {
                    size: file.size,
                    xattrs: file.xattrs.clone(),
                    ino: (file.remarks.linked && !file.is_link()).then_some(file.fingerprint.ino),
                    sparse: file.remarks.sparse,
                    ..item_of(&file.fingerprint, content)
                };
                listing.items.insert(path, item);
            }
            Node::Special { fingerprint, kind } => {
                listing.items.insert(path, item_of(fingerprint, ItemContent::Special((*kind).to_owned())));
            }
            Node::Skipped { reason, .. } => {
                listing.skipped.insert(path, *reason);
            }
            // A restore searches for these files itself before it removes them.
            Node::StagedFile => {}
        }
    }
}

fn item_of(fingerprint: &FileFingerprint, content: ItemContent) -> ListingItem {
    ListingItem {
        content,
        mode: fingerprint.permissions(),
        mtime: fingerprint.mtime,
        size: 0,
        xattrs: Xattrs::default(),
        ino: None,
        sparse: false,
    }
}
