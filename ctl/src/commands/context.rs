//! `context …`.

use std::io;

use fermata_protocol::context::{
    ContextFlashSave, ContextItem, ContextList, ContextPin, ContextPut, ContextPutResult, ContextRecall, ContextSearch,
    ContextShow, FlashSaveResult, NewItem, Tier,
};
use fermata_protocol::{ProjectName, Target};

use super::arguments::text_or_stdin;
use crate::cli::groups::{ContextCommand, ItemArgs};
use crate::cli::values::ItemRef;
use crate::errors::{CommandError, CommandResult};
use crate::output::{Cell, FieldList, Paint, Printer, TextTable};
use crate::session::DaemonSession;
use crate::terminal_text::clean;
use crate::units::{counted, number};

pub fn run(session: &mut DaemonSession, command: ContextCommand) -> CommandResult {
    match command {
        ContextCommand::Ls { target, tier, archived, limit, before } => {
            let params = ContextList { target, tier, archived, before, limit };
            let items = session.call(&params)?.items;
            print_items(session, &items)
        }
        ContextCommand::Show { item } => {
            let (project, id) = item_key(item)?;
            let item = session.call(&ContextShow { project, id })?;
            session.out.object(&item, Some(item.id.to_string()), print_item)?;
            Ok(0)
        }
        ContextCommand::Add { target, item } => add(session, Some(target), item),
        ContextCommand::Pin { item } => pin(session, item, true),
        ContextCommand::Unpin { item } => pin(session, item, false),
        ContextCommand::Search { target, limit, words } => {
            let params = ContextSearch { target, query: words.join(" "), limit };
            let items = session.call(&params)?.items;
            print_items(session, &items)
        }
        ContextCommand::Recall { items } => recall(session, items),
        ContextCommand::FlashSave { target } => {
            let result = session.call(&ContextFlashSave { target })?;
            session.out.object(&result, None, print_flash_save)?;
            Ok(0)
        }
    }
}

/// Adds one item; `None` stands for the calling agent.
pub fn add(session: &mut DaemonSession, target: Option<Target>, item: ItemArgs) -> CommandResult {
    let item = NewItem { kind: item.kind, text: text_or_stdin(item.text)?, pinned: item.pinned };
    let result = session.call(&ContextPut { target, items: vec![item] })?;
    let id = result.ids.first().map(|id| id.to_string());
    session.out.object(&result, id, print_added)?;
    Ok(0)
}

fn print_added(out: &mut Printer, result: &ContextPutResult) -> io::Result<()> {
    let ids: Vec<String> = result.ids.iter().map(|id| id.to_string()).collect();
    let archived = match result.items_archived {
        0 => String::new(),
        n => format!("; a flash save archived {}", counted(n, "item")),
    };
    out.line(format_args!(
        "item {} added: {} tokens (total {}){archived}",
        ids.join(", "),
        number(result.tokens),
        number(result.total_tokens)
    ))
}

fn print_items(session: &mut DaemonSession, items: &[ContextItem]) -> CommandResult {
    let id = |item: &ContextItem| item.id;
    session.out.rows(items, "no context items", id, |out, items| {
        let mut table = TextTable::new(&[">ID", "AGENT", "TYPE", "TIER", ">SCORE", ">TOKENS", "ADDED", "TEXT"]);
        for item in items {
            table.row([
                item.id.to_string().into(),
                item.agent.as_str().into(),
                item.kind.as_str().into(),
                tier(item),
                format!("{:.2}", item.score).into(),
                number(item.tokens).into(),
                out.ago(item.created_at).into(),
                Cell::from(&item.text),
            ]);
        }
        table
    })?;
    Ok(0)
}

fn tier(item: &ContextItem) -> Cell {
    if item.archived {
        return Cell::painted("archived", Paint::Dim);
    }
    let paint = match item.tier {
        Tier::Hot => Paint::Bad,
        Tier::Warm => Paint::Attention,
        Tier::Cold => Paint::Dim,
    };
    let pin = if item.pinned { " (pinned)" } else { "" };
    Cell::painted(format!("{}{pin}", item.tier.as_str()), paint)
}

fn print_item(out: &mut Printer, item: &ContextItem) -> io::Result<()> {
    let fields = FieldList::default()
        .add("item", item.id.to_string())
        .add("agent", item.agent.as_str())
        .add("type", item.kind.as_str())
        .add("tier", tier(item))
        .add("score", format!("{:.3}", item.score))
        .add("tokens", number(item.tokens))
        .add("accesses", number(item.access_count))
        .add("added", out.ago(item.created_at));
    out.fields(&fields)?;
    out.line("")?;
    for line in item.text.lines() {
        out.line(clean(line))?;
    }
    Ok(())
}

fn print_flash_save(out: &mut Printer, result: &FlashSaveResult) -> io::Result<()> {
    let fields = FieldList::default()
        .add("tokens", format!("{} -> {}", number(result.tokens_before), number(result.tokens_after)))
        .add(
            "archived",
            format!("{}, {}", counted(result.items_archived, "item"), counted(result.tokens_archived, "token")),
        )
        .add("kept", format!("{} hot, {} warm", result.hot_items_retained, result.warm_items_retained));
    out.fields(&fields)
}

fn pin(session: &mut DaemonSession, item: ItemRef, pinned: bool) -> CommandResult {
    let (project, id) = item_key(item)?;
    let done = session.call(&ContextPin { project, id, pinned })?;
    let word = if pinned { "pinned" } else { "unpinned" };
    session.out.sentence(&done, format_args!("item {id} {word}"))?;
    Ok(0)
}

fn recall(session: &mut DaemonSession, items: Vec<ItemRef>) -> CommandResult {
    let (project, ids) = of_one_project(items)?;
    let count = ids.len();
    let done = session.call(&ContextRecall { project, ids })?;
    session.out.sentence(&done, format_args!("{} recalled", counted(count as u64, "item")))?;
    Ok(0)
}

/// Checks that all items belong to one project; that of the first item applies to items without one.
fn of_one_project(items: Vec<ItemRef>) -> Result<(Option<ProjectName>, Vec<i64>), CommandError> {
    let mut project: Option<ProjectName> = None;
    let mut ids = Vec::new();
    for item in items {
        let (own, id) = item_key(item)?;
        match (&project, own) {
            (Some(first), Some(own)) if *first != own => {
                return Err(CommandError::usage(format!(
                    "items of {first} and {own} cannot be recalled in one command"
                )));
            }
            (None, Some(own)) if ids.is_empty() => project = Some(own),
            (None, Some(own)) => {
                return Err(CommandError::usage(format!("the items before {own}/{id} name no project"))
                    .hint("name the project with the first item"));
            }
            _ => {}
        }
        ids.push(id);
    }
    Ok((project, ids))
}

fn item_key(item: ItemRef) -> Result<(Option<ProjectName>, i64), CommandError> {
    match i64::try_from(item.id) {
        Ok(id) => Ok((item.project, id)),
        Err(_) => Err(CommandError::usage(format!("{} is not an item id", item.id))),
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    fn item_refs(texts: &[&str]) -> Vec<ItemRef> {
        texts.iter().map(|t| t.parse().expect("valid")).collect()
    }

    #[test]
    fn the_project_of_the_first_item_applies_to_the_rest() {
        let (project, ids) = of_one_project(item_refs(&["web/3", "4", "web/5"])).expect("one project");
        assert_eq!((project.map(|p| p.to_string()).as_deref(), ids), (Some("web"), vec![3, 4, 5]));
        assert_eq!(of_one_project(item_refs(&["3"])).expect("own").0, None);
        assert!(of_one_project(item_refs(&["web/3", "api/4"])).is_err());
        assert!(of_one_project(item_refs(&["3", "web/4"])).is_err());
    }
}
