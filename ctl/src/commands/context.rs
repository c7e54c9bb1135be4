//! `context …`.

use std::io;

use fermata_protocol::context::{
    ContextFlashSave, ContextItem, ContextList, ContextPin, ContextPut, ContextPutResult, ContextRecall, ContextSearch,
    ContextShow, FlashSaveResult, NewItem, Tier,
};
use fermata_protocol::{ProjectName, Target};

use super::{Ended, text_or_stdin};
use crate::cli::groups::{ContextCommand, ItemArgs};
use crate::cli::values::Numbered;
use crate::errors::Failure;
use crate::output::{Cell, Facts, Output, Paint, Table, clean};
use crate::session::Session;
use crate::units::number;

/// Runs a `context` command.
pub fn run(session: &mut Session, command: ContextCommand) -> Ended {
    match command {
        ContextCommand::Ls { target, tier, archived, limit, before } => {
            let params = ContextList { target, tier, archived, before, limit };
            let items = session.call(&params)?.items;
            listed(session, &items)
        }
        ContextCommand::Show { item } => {
            let (project, id) = place(item)?;
            let item = session.call(&ContextShow { project, id })?;
            session.out.one(&item, Some(item.id.to_string()), shown)?;
            Ok(0)
        }
        ContextCommand::Add { target, item } => add(session, Some(target), item),
        ContextCommand::Pin { item } => pin(session, item, true),
        ContextCommand::Unpin { item } => pin(session, item, false),
        ContextCommand::Search { target, limit, words } => {
            let params = ContextSearch { target, query: words.join(" "), limit };
            let items = session.call(&params)?.items;
            listed(session, &items)
        }
        ContextCommand::Recall { items } => recall(session, items),
        ContextCommand::FlashSave { target } => {
            let result = session.call(&ContextFlashSave { target })?;
            session.out.one(&result, None, flash_saved)?;
            Ok(0)
        }
    }
}

/// Adds one item; `agent context` does the same for the caller itself.
pub fn add(session: &mut Session, target: Option<Target>, item: ItemArgs) -> Ended {
    let item = NewItem { kind: item.kind, text: text_or_stdin(item.text)?, pinned: item.pinned };
    let result = session.call(&ContextPut { target, items: vec![item] })?;
    let id = result.ids.first().map(|id| id.to_string());
    session.out.one(&result, id, put)?;
    Ok(0)
}

fn put(out: &mut Output, result: &ContextPutResult) -> io::Result<()> {
    let ids: Vec<String> = result.ids.iter().map(|id| id.to_string()).collect();
    let archived = match result.items_archived {
        0 => String::new(),
        n => format!("; a flash save archived {n} items"),
    };
    out.line(format_args!(
        "item {} added: {} tokens, {} in all{archived}",
        ids.join(", "),
        number(result.tokens),
        number(result.total_tokens)
    ))
}

fn listed(session: &mut Session, items: &[ContextItem]) -> Ended {
    let id = |item: &ContextItem| item.id;
    session.out.rows(items, "no context items", id, |out, items| {
        let mut table = Table::new(&[">ID", "AGENT", "TYPE", "TIER", ">SCORE", ">TOKENS", "ADDED", "TEXT"]);
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

fn shown(out: &mut Output, item: &ContextItem) -> io::Result<()> {
    let facts = Facts::default()
        .add("item", item.id.to_string())
        .add("agent", item.agent.as_str())
        .add("type", item.kind.as_str())
        .add("tier", tier(item))
        .add("score", format!("{:.3}", item.score))
        .add("tokens", number(item.tokens))
        .add("read", format!("{} times", item.access_count))
        .add("added", out.ago(item.created_at));
    out.facts(&facts)?;
    out.line("")?;
    for line in item.text.lines() {
        out.line(clean(line))?;
    }
    Ok(())
}

fn flash_saved(out: &mut Output, result: &FlashSaveResult) -> io::Result<()> {
    let facts = Facts::default()
        .add("tokens", format!("{} before, {} after", number(result.tokens_before), number(result.tokens_after)))
        .add("archived", format!("{} items, {} tokens", result.items_archived, number(result.tokens_archived)))
        .add("kept", format!("{} hot, {} warm", result.hot_items_retained, result.warm_items_retained));
    out.facts(&facts)
}

fn pin(session: &mut Session, item: Numbered, pinned: bool) -> Ended {
    let (project, id) = place(item)?;
    let done = session.call(&ContextPin { project, id, pinned })?;
    let word = if pinned { "pinned" } else { "unpinned" };
    session.out.said(&done, format_args!("item {id} {word}"))?;
    Ok(0)
}

fn recall(session: &mut Session, items: Vec<Numbered>) -> Ended {
    let (project, ids) = together(items)?;
    let count = ids.len();
    let done = session.call(&ContextRecall { project, ids })?;
    let noun = if count == 1 { "item" } else { "items" };
    session.out.said(&done, format_args!("{count} {noun} brought back"))?;
    Ok(0)
}

/// Brings items of one project together; the first one's project holds for those without.
fn together(items: Vec<Numbered>) -> Result<(Option<ProjectName>, Vec<i64>), Failure> {
    let mut project: Option<ProjectName> = None;
    let mut ids = Vec::new();
    for item in items {
        let (own, id) = place(item)?;
        match (&project, own) {
            (Some(first), Some(own)) if *first != own => {
                return Err(Failure::usage(format!("items of {first} and of {own} cannot be brought back at once")));
            }
            (None, Some(own)) if ids.is_empty() => project = Some(own),
            (None, Some(own)) => {
                return Err(Failure::usage(format!("which project is meant before {own}/{id}?"))
                    .hint("name the project at the first item"));
            }
            _ => {}
        }
        ids.push(id);
    }
    Ok((project, ids))
}

fn place(item: Numbered) -> Result<(Option<ProjectName>, i64), Failure> {
    match i64::try_from(item.id) {
        Ok(id) => Ok((item.project, id)),
        Err(_) => Err(Failure::usage(format!("{} is no item's id", item.id))),
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    fn numbered(texts: &[&str]) -> Vec<Numbered> {
        texts.iter().map(|t| t.parse().expect("valid")).collect()
    }

    #[test]
    fn the_first_items_project_holds_for_the_rest() {
        let (project, ids) = together(numbered(&["web/3", "4", "web/5"])).expect("one project");
        assert_eq!((project.map(|p| p.to_string()).as_deref(), ids), (Some("web"), vec![3, 4, 5]));
        assert_eq!(together(numbered(&["3"])).expect("own").0, None);
        assert!(together(numbered(&["web/3", "api/4"])).is_err());
        assert!(together(numbered(&["3", "web/4"])).is_err());
    }
}
